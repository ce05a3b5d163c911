"""Operators, their plain PyTorch twins, and what the compiled kernels take."""
