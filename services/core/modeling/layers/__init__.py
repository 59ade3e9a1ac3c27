"""What networks are made of: products, attention, positions, adapters, pooling, on packed batches."""
