"""grpc.health.v1: what is ready, and who watches it. Knows names and states, not what stands behind them.

The library's own asyncio servicer forgets the other watchers of a name when one leaves, and holds a lock
while it writes to a watcher, so one that does not read would stop every change of state. This one does
neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft.rpc.errors import StatusError

HEALTH_SERVICE = "grpc.health.v1.Health"
LIVENESS = "liveness"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Readiness of the whole server ("") and of each service; "liveness" is SERVING as long as the process
    answers.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._is_serving = False
        self._ready_names = frozenset({"", *names})
        self._changed = asyncio.Event()

    @property
    def is_serving(self) -> bool:
        """Whether the server is ready."""
        return self._is_serving

    def set_serving(self, is_serving: bool) -> None:
        """Change the readiness of every name and wake the watchers."""
        self._is_serving = is_serving
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, name: str) -> Any:
        if name == LIVENESS:
            return SERVING
        if name not in self._ready_names:
            return SERVICE_UNKNOWN
        return SERVING if self._is_serving else NOT_SERVING

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> health_pb2.HealthCheckResponse:
        """The state of one name. NOT_FOUND for a name that this server does not have."""
        status = self._status(request.service)
        if status == SERVICE_UNKNOWN:
            raise StatusError(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state of one name, now and at every change."""
        last: Any = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()
