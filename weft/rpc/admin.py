"""The admin port: status, log level, drain, health and channelz, apart from what clients reach.

A server of its own: what is refused to clients or counted of them does not touch it. With keys, a key must
name each method that it may call here: no client's key can stop the service. Knows no service.
"""

# ruff: noqa: N802 - the names are the wire's

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from grpc_channelz.v1 import channelz_pb2_grpc

from weft import __version__, logs
from weft.rpc.channelz import CHANNELZ_SERVICE, channelz_servicer
from weft.rpc.errors import invalid_argument
from weft.rpc.guard import Guard
from weft.rpc.interceptor import current_caller
from weft.rpc.reload import WatchedFiles
from weft.rpc.server import Server
from weft.rpc.unknown_fields import unknown_fields
from weft.v1 import admin_service_pb2 as pb
from weft.v1.admin_service_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server

SERVICE_NAME = "weft.v1.AdminService"
log = logs.get_logger("admin")


class AdminServicer(AdminServiceServicer):
    """Looks after `server`, which is another one than it is registered on."""

    def __init__(self, server: Server, watched: Sequence[WatchedFiles] = ()) -> None:
        self._server = server
        self._watched = watched
        self._started = time.monotonic()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """How the process is."""
        _refuse_unknown_fields(request)
        server = self._server
        counters = server.counters
        level, dropped = logs.state()
        return pb.GetStatusResponse(
            weft_version=__version__,
            services=server.service_names,
            address=str(server.address),
            process_id=os.getpid(),
            uptime_seconds=time.monotonic() - self._started,
            is_serving=server.health.is_serving,
            is_stopping=server.is_stopping,
            calls_begun=counters.begun,
            calls_ended=counters.ended,
            calls_by_code=dict(counters.by_code),
            log_level=level,
            dropped_log_records=dropped,
            files=[
                pb.WatchedFile(what=each.what, reloads=each.num_reloads, failures=each.num_failures)
                for each in self._watched
            ],
        )

    async def SetLogLevel(self, request: pb.SetLogLevelRequest, context: Any) -> pb.SetLogLevelResponse:
        """Change what is logged."""
        _refuse_unknown_fields(request)
        if request.level not in logs.LEVELS:
            raise invalid_argument([("level", f"must be one of {', '.join(logs.LEVELS)}")])
        previous, _ = logs.state()
        logs.set_level(request.level)
        log.warning("log level", level=request.level, previous=previous, key=current_caller.get().name)
        return pb.SetLogLevelResponse(previous=previous)

    async def StartDrain(self, request: pb.StartDrainRequest, context: Any) -> pb.StartDrainResponse:
        """Begin to stop, as a SIGTERM would."""
        _refuse_unknown_fields(request)
        log.warning("stopping", key=current_caller.get().name, peer=context.peer())
        self._server.request_stop()
        return pb.StartDrainResponse()


def _refuse_unknown_fields(request: Any) -> None:
    if found := unknown_fields(request):
        raise invalid_argument([(path, "is no field of this version") for path in found])


def admin_server(server: Server, guard: Guard) -> Server:
    """A server with everything of the admin port for `server`. The caller starts and stops it."""
    admin = Server(
        (SERVICE_NAME, CHANNELZ_SERVICE),
        authenticator=guard.authenticator,
        tls=guard.admin_tls,
        needs_named_methods=True,
    )
    add_AdminServiceServicer_to_server(AdminServicer(server, guard.watched), admin.grpc)
    channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz_servicer(), admin.grpc)
    admin.set_serving()
    return admin
