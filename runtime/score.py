"""Scores of what was read against the truth."""
