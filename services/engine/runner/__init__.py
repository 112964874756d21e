"""What runs a model for the core: inputs, cache memory, forward, sampling. Knows no transport."""
