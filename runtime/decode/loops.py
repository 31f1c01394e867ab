"""Repetition loops, found while they are generated."""
