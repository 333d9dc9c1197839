"""Whole archives: films in bulk, and the log of what was done."""
