"""Compiled kernels for CPUs with AVX-512 BF16; torch does the same work where they are not there."""
