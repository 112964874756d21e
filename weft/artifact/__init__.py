"""The artifact: what the quantizer writes and the engine and gateway read.

`store` and `manifest` use the standard library alone, so a process without torch can read an artifact;
`packing` and `checkpoint` need torch. Nothing here knows how weights are quantized, or who asked for them.
"""
