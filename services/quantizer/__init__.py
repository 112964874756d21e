"""The quantizer: a batch job that turns a checkpoint into a 4-bit artifact."""
