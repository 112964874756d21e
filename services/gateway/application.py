"""The gateway as a process: what is started, in which order, and stopped in the other."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.gateway.admission.admission import Admission, AdmissionLimits
from services.gateway.admission.flags import quota_limits_of
from services.gateway.admission.quotas import Quotas
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.links.discovery import Discovery, parse_source
from services.gateway.links.engine_client import EngineLink
from services.gateway.links.fleet import Fleet
from services.gateway.links.terms import LinkTimes
from services.gateway.loop_lag import watch_lag
from services.gateway.metrics import GatewayMetrics
from services.gateway.routing.router import Router
from services.gateway.servicer import GatewayServicer
from services.gateway.sessions.database import SessionLimits
from services.gateway.sessions.sessions import Sessions
from services.gateway.sessions.store import SessionStore
from services.gateway.streams.orphans import RetentionLimits
from services.gateway.text.assets import AssetSource
from weft import logs
from weft.limits import limits_of
from weft.rpc.address import Address
from weft.rpc.auth import Authenticator
from weft.rpc.guard import engine_tls_of
from weft.rpc.tls import ServerTls
from weft.v1.gateway_service_pb2_grpc import add_GatewayServiceServicer_to_server

if TYPE_CHECKING:
    from services.gateway.http.server import HttpServer
    from weft.rpc.server import Server

SERVICE_NAME = "weft.v1.GatewayService"
log = logs.get_logger("gateway")


class GatewayApplication:
    """What `weft.rpc.server.serve` runs. It is loaded once the first engine has said Hello."""

    service_names: Sequence[str] = (SERVICE_NAME,)

    def __init__(
        self,
        config: GatewayConfig,
        *,
        authenticator: Authenticator | None = None,
        engine_api_key: str | None = None,
        tls: ServerTls | None = None,
        times: LinkTimes | None = None,
    ) -> None:
        self.config = config
        self.authenticator = authenticator
        self.tls = tls
        self.router = Router(
            wait_s=config.engine_wait_seconds, weights=config.version_weight, on_change=self._on_change
        )
        self.source = AssetSource(
            artifacts=config.artifacts,
            directory=config.tokenizer,
            in_use=lambda: [link.assets for link in self.router.links],
        )
        gateway_id = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"

        def make_link(target: str) -> EngineLink:
            return EngineLink(
                target,
                self.router,
                gateway_id=gateway_id,
                load_assets=self.source.load,
                api_key=engine_api_key,
                tls=engine_tls_of(config),
                times=times or LinkTimes(dead_s=config.engine_dead_seconds),
            )

        self.fleet = Fleet(self.router, make_link)
        limits = AdmissionLimits(
            max_live_requests=config.max_live_requests,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
        )
        self.sessions = _sessions_of(config)
        self.gateway = Gateway(
            self.router,
            Admission(limits, Quotas(quota_limits_of(config), num_processes=config.processes)),
            self.sessions,
            ageing_s=config.priority_ageing_seconds,
            max_request_s=config.max_request_seconds,
            slow_client_s=config.slow_client_seconds,
            max_coalesce_s=config.max_coalesce / 1000,
            limits=limits_of(config),
            retention=RetentionLimits(
                ttl_s=config.orphan_ttl,
                # With several processes a client would not find the one that kept its request.
                max_items=config.max_retained_requests if config.processes == 1 else 0,
                max_bytes=config.max_retained_bytes,
            ),
        )
        if authenticator is not None:
            self.gateway.renew = authenticator.renew
        self.metrics = GatewayMetrics(self.gateway)
        self.http: HttpServer | None = None
        self._server: Server | None = None
        self._is_loaded = False
        self._is_up = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        sources = [parse_source(text, dns_period_s=config.engine_resolve_seconds) for text in config.engine]
        self.discovery = Discovery(sources, self.fleet.set_targets)

    async def load(self, server: Server) -> None:
        """Register, connect, and wait for the first engine."""
        self._server = server
        add_GatewayServiceServicer_to_server(
            GatewayServicer(self.gateway, num_processes=self.config.processes), server.grpc
        )
        self.fleet.start()
        lag = watch_lag(self.metrics.lag_s.observe)
        works = (self.discovery.run(), self.gateway.sweep(), self.sessions.sweep(), lag)
        self._tasks = [asyncio.create_task(work) for work in works]
        if self.config.http is not None:
            await self._start_http(self.config.http)
        await self._is_up.wait()
        self._is_loaded = True

    async def drain(self) -> None:
        """Let running requests end."""
        await self.gateway.drain(self.config.drain_seconds)

    async def close(self) -> None:
        """Stop HTTP, links and template processes."""
        if self.http is not None:
            await self.http.stop()
        await self.gateway.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fleet.close()
        await self.sessions.close()
        await self.source.close()

    async def _start_http(self, address: Address) -> None:
        from services.gateway.http.server import HttpServer

        self.http = HttpServer(
            self.gateway,
            self.metrics,
            self.authenticator,
            headers_s=self.config.http_header_seconds,
            body_s=self.config.http_body_seconds,
            tls=self.tls,
        )
        await self.http.start(address, shares_port=self.config.processes > 1, own=self.config.process_http)

    def _on_change(self) -> None:
        """Readiness follows the links."""
        if self.router.is_ready:
            self._is_up.set()
        if self._is_loaded and self._server is not None and not self._server.is_stopping:
            self._server.health.set_serving(self.router.is_ready)


def _sessions_of(config: GatewayConfig) -> Sessions:
    """What keeps the sessions. Raises StoreRefused."""
    limits = SessionLimits(
        ttl_s=config.session_ttl,
        max_sessions=config.max_sessions,
        max_sessions_per_key=config.max_sessions_per_key,
        max_tokens=config.max_session_tokens,
    )
    return Sessions(SessionStore(config.sessions, limits), retain_seconds=config.session_retain_seconds)
