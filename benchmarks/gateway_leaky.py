"""A gateway that leaks on purpose: `python -m benchmarks.gateway_leaky serve FLAGS`, as of services.gateway.

Its handlers swallow the cancellation of their call and return, after which the library never frees what it
keeps for the call. What does not see about 100 bytes a request here does not measure memory.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from services.gateway.serve import main
from weft.rpc.interceptor import Interceptor
from weft.rpc.server import exit_process


def plant_leak() -> None:
    """Make every streaming call return where it ought to raise."""
    wrap = Interceptor._wrap

    def leaky_wrap(*arguments: Any) -> Any:
        handler: Any = wrap(*arguments)
        kind = "unary_stream" if handler.stream_stream is None else "stream_stream"
        stream = getattr(handler, kind)

        async def swallow(request: Any, context: Any) -> None:
            try:
                await stream(request, context)
            except asyncio.CancelledError:
                return

        return handler if stream is None else handler._replace(**{kind: swallow})

    Interceptor._wrap = leaky_wrap  # type: ignore[method-assign]


if __name__ == "__main__":
    plant_leak()
    exit_process(main(sys.argv[1:]))
