"""Export of the trained networks to ONNX, with parity reports. Needs the extra `build` (PyTorch, ONNX, ONNX Runtime)."""
