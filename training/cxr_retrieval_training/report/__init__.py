"""Finished runs → figures, pictures and the page."""
