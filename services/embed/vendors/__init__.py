"""The forms of other vendors over embeddings: an adapter for each, fields in, fields out, no logic."""
