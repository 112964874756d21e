"""The OpenAI-compatible HTTP face of the gateway. It shares admission, validation and engines with gRPC."""
