"""The embedded server: the production model repository, run on the CPU by the real Triton of the `nvidia-pytriton` wheel."""
