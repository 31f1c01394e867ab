"""Output that conforms to a grammar: the page's JSON, a user's JSON schema, or a regular expression."""
