"""Kernels of our own for CUDA, in Triton, and passes replayed as graphs."""
