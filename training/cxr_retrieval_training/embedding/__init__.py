"""The network that embeds: its losses, its training, the comparisons."""
