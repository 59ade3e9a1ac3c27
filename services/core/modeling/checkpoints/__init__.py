"""Published folders: weights, adapters, tokenizers, conversion."""
