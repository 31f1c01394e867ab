"""How far a page's answer can be trusted."""
