"""What lies on a page before any model looks: ink, lines, the height of its text."""
