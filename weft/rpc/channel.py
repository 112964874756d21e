"""Client channels between services. Knows no service.

The options make a dead or frozen peer show within seconds; retries are explicit code in the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc

from weft.rpc.auth import auth_metadata
from weft.rpc.options import MAX_INTERNAL_MESSAGE_BYTES, channel_options
from weft.rpc.tls import ChannelTls

__all__ = ["blocking_channel", "channel_options", "open_channel"]


class _KeyedChannel:
    """A channel whose every call carries the key. Plain wrapping: a client interceptor costs each message."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    async def __aenter__(self) -> _KeyedChannel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close(None)

    def _keyed(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        method = make(*args, **kwargs)

        def call(*call_args: Any, metadata: Any = None, **call_kwargs: Any) -> Any:
            return method(*call_args, metadata=(*(metadata or ()), *self._metadata), **call_kwargs)

        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.unary_unary, *args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.unary_stream, *args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.stream_unary, *args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """As of the channel."""
        return self._keyed(self._channel.stream_stream, *args, **kwargs)


def blocking_channel(
    target: str, tls: ChannelTls | None, options: Sequence[tuple[str, int | str]]
) -> grpc.Channel:
    """A channel for calls that block, as commands make them. Raises TlsError."""
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, tls.credentials(), options=[*options, *tls.options()])


def open_channel(
    target: str,
    api_key: str | None = None,
    *,
    tls: ChannelTls | None = None,
    max_message_bytes: int = MAX_INTERNAL_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to HOST:PORT (or another gRPC target) that sends `api_key`, if any, with each call.

    `tls` reads its files now; without it everything goes in plain text. Raises TlsError.

    Nothing connects before the first call. The caller closes it, after cancelling its calls: an abandoned
    call stays alive on the server.
    """
    options: list[tuple[str, int | str]] = [*channel_options(max_message_bytes=max_message_bytes)]
    if tls is None:
        channel = grpc.aio.insecure_channel(target, options=options)
    else:
        channel = grpc.aio.secure_channel(target, tls.credentials(), options=[*options, *tls.options()])
    metadata = auth_metadata(api_key)
    return cast(grpc.aio.Channel, _KeyedChannel(channel, metadata)) if metadata else channel
