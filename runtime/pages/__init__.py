"""Files to pages to patches."""
