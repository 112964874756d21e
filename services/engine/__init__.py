"""The engine: one model, a blocked KV cache, a continuous batch. It speaks token ids, never text."""
