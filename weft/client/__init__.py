"""Weft from Python, with threads or asyncio: generate, chat, sessions, and going on where a stream broke off.

    from weft.client import Client

    with Client("127.0.0.1:50052") as client:
        for delta in client.generate("Once upon a time", max_tokens=60, temperature=0):
            print(delta.text, end="", flush=True)

A stream that ends early with a resume token is taken up again by itself, and so is one whose connection is
lost when it was started with `resumable=True`: what was given out is not given out again. Knows the public
protocol and nothing of what is behind it.
"""

from __future__ import annotations

from weft.client.aio import AsyncClient, AsyncStream
from weft.client.progress import RetryPolicy
from weft.client.requests import Completion, Delta, make_request
from weft.client.threads import Client, Stream
from weft.rpc.errors import StatusError

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "Delta",
    "RetryPolicy",
    "StatusError",
    "Stream",
    "make_request",
]
