"""One query: the nearest others, their vote, and the picture of it."""
