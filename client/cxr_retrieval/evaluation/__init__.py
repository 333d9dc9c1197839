"""How good the answers are, and how much load they bear."""
