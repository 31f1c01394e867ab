"""Drafts: cheap guesses of the next tokens, verified by the model in one step."""
