"""The gateway: what clients talk to. Text and chat in, text out; token ids to and from engines.

It never imports torch, triton or safetensors, and of an artifact reads only tokenizer, template and
generation config.
"""
