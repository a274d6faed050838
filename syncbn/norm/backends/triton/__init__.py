"""The Triton backend, for CUDA tensors."""
