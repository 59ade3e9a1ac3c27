"""Whole passes and single operations in C, once per instruction set; torch does the same work without."""
