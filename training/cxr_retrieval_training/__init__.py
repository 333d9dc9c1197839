"""Training of the lung-segmentation ensemble and the attention embedder. Needs the extra `training` (PyTorch)."""
