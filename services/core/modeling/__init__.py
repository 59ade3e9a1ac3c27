"""Networks and checkpoint loading: tensors in, tensors out."""
