"""grpc.channelz.v1: what the gRPC library knows of its servers, channels, connections. Knows no service.

The library's servicer refuses every answer with a field that its messages do not know, and channels have one
since a later release than the messages; it also answers an unknown id with no message at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import json_format
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # its stubs leave it out
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from weft.rpc.errors import StatusError

CHANNELZ_SERVICE = "grpc.channelz.v1.Channelz"
# Method -> the library's answer as JSON. It raises ValueError for an unknown id.
_ANSWERS: dict[str, Callable[[Any], bytes]] = {
    "GetTopChannels": lambda request: cygrpc.channelz_get_top_channels(request.start_channel_id),
    "GetServers": lambda request: cygrpc.channelz_get_servers(request.start_server_id),
    "GetServer": lambda request: cygrpc.channelz_get_server(request.server_id),
    "GetServerSockets": lambda request: cygrpc.channelz_get_server_sockets(
        request.server_id, request.start_socket_id, request.max_results
    ),
    "GetChannel": lambda request: cygrpc.channelz_get_channel(request.channel_id),
    "GetSubchannel": lambda request: cygrpc.channelz_get_subchannel(request.subchannel_id),
    "GetSocket": lambda request: cygrpc.channelz_get_socket(request.socket_id),
}


def _method(answer: Callable[[Any], bytes], response_type: type[Any]) -> Callable[[Any, Any], Any]:
    async def method(request: Any, context: Any) -> Any:
        try:
            found = answer(request)
        except (ValueError, OverflowError):
            raise StatusError(grpc.StatusCode.NOT_FOUND, "there is nothing of this id") from None
        return json_format.Parse(found, response_type(), ignore_unknown_fields=True)

    return method


def channelz_servicer() -> channelz_pb2_grpc.ChannelzServicer:
    """A servicer of every method."""
    servicer = channelz_pb2_grpc.ChannelzServicer()
    for name, answer in _ANSWERS.items():
        setattr(servicer, name, _method(answer, getattr(channelz_pb2, f"{name}Response")))
    return servicer
