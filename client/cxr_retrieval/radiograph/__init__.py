"""File → 256×256 uint8: which files are frontal chest films, how their values become grey, and worker processes that decode them."""
