"""Checkpoints that others have quantized, made into artifacts."""
