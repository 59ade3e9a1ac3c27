"""Embeddings: one vector per input."""
