"""pagemill turns document pages into structured text at the lowest cost per page."""
