"""The compile lane: every kernel made into machine code without a GPU, read, and held to its gates."""
