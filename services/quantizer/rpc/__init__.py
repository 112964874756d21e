"""The quantizer on the wire."""
