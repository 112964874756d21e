"""The HTTP server: routes, one socket, uvicorn on the event loop that gRPC runs on.

Routing goes by the path that the server parsed, never by the Host header, and redirects nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway.gateway import Gateway
from services.gateway.http.body import BODY_S
from services.gateway.http.endpoints import Completions, Health, Metrics, Models
from services.gateway.http.errors import HttpError, body_of, encode
from services.gateway.http.guard import Guard
from services.gateway.http.protocol import HEADERS_S, Http11
from services.gateway.metrics import CONTENT_TYPE, GatewayMetrics
from weft import logs
from weft.rpc.address import Address
from weft.rpc.auth import Authenticator
from weft.rpc.server import BindError
from weft.rpc.tls import ServerTls

KEEP_ALIVE_S = 30
STOP_GRACE_S = 2
log = logs.get_logger("gateway.http")


class _Uvicorn(uvicorn.Server):
    """Signals belong to the gRPC server's life; this one is told when to stop. A TLS handshake may take
    `handshake_s`: nothing else is on the clock before its end, and asyncio would wait for a minute.
    """

    handshake_s = HEADERS_S

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on `sockets`."""
        config = self.config
        make = functools.partial(
            config.http_protocol_class, config=config, server_state=self.server_state, app_state={}
        )
        self.servers: list[asyncio.base_events.Server] = [
            await asyncio.get_running_loop().create_server(
                make,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=self.handshake_s if config.ssl else None,
            )
            for each in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signals alone."""
        yield


class HttpServer:
    """The OpenAI-compatible face. `start` binds, `stop` lets open answers end for a moment."""

    def __init__(
        self,
        gateway: Gateway,
        metrics: GatewayMetrics,
        authenticator: Authenticator | None,
        *,
        headers_s: float = HEADERS_S,
        body_s: float = BODY_S,
        tls: ServerTls | None = None,
    ) -> None:
        """`headers_s` and `body_s` are for how long the headers and the body of a request may take."""
        self.address = Address("127.0.0.1", 0)
        self._headers_s = headers_s
        self._limits = gateway.limits
        self._tls = tls
        text, chat = (
            Completions(gateway, authenticator, is_chat=is_chat, body_s=body_s) for is_chat in (False, True)
        )
        self.app = Starlette(
            routes=[
                Route("/v1/completions", text, methods=["POST"]),
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/models", Models(gateway, authenticator), methods=["GET"]),
                Route("/v1/models/{name}", Models(gateway, authenticator), methods=["GET"]),
                Route("/healthz", Health(gateway, authenticator, is_open=True), methods=["GET"]),
                Route(
                    "/metrics", Metrics(gateway, authenticator, metrics.text, CONTENT_TYPE), methods=["GET"]
                ),
            ],
            exception_handlers={HTTPException: _refusal},
        )
        self.app.router.redirect_slashes = False
        self._server: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, address: Address, *, shares_port: bool = False, own: Address | None = None) -> None:
        """Bind and serve. With `shares_port`, other processes may listen there, too; `own` is then an address
        that only this one answers. Raises BindError.
        """
        listeners = [_listen(address, shares_port=shares_port)]
        self.address = address._replace(port=listeners[0].getsockname()[1])
        if own is not None:
            listeners.append(_listen(own))
        config = uvicorn.Config(
            Guard(self.app),
            http=functools.partial(
                Http11,
                headers_s=self._headers_s,
                max_connections=self._limits.max_connections,
                max_header_bytes=self._limits.max_header_bytes,
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=self._limits.max_header_bytes,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
        config.load()
        if self._tls is not None:
            config.ssl = self._tls.context()
        self._server = _Uvicorn(config)
        self._server.handshake_s = self._headers_s
        self._task = asyncio.create_task(self._server.serve(sockets=listeners))
        log.info("http", address=str(self.address), tls=self._tls is not None)

    async def stop(self) -> None:
        """Take no more connections, let open answers end within `STOP_GRACE_S`, stop. May come twice."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        await asyncio.gather(self._task, return_exceptions=True)
        self._server = None


def _listen(address: Address, *, shares_port: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server(
            (address.host, address.port), family=family, backlog=512, reuse_port=shares_port
        )
    except OSError as error:
        raise BindError(f"cannot listen on {address}: {error.strerror or error}") from None


async def _refusal(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the body that clients expect."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers: Any = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    text = {404: "there is no such path", 405: "the method is not allowed here"}.get(status, "refused")
    body = encode(body_of(HttpError(status, text)))
    return Response(body, status_code=status, headers=headers, media_type="application/json")
