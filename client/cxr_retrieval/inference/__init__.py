"""Triton: the networks, asked over gRPC."""
