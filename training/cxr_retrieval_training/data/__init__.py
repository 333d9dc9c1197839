"""Films as training reads and varies them."""
