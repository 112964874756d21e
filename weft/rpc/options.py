"""Channel arguments of every server and client: message caps, keepalive, and what the library should not do.

Knows no service. Each name is worth a check when the library moves: what some do has changed before.
"""

from __future__ import annotations

import dataclasses

from weft.limits import DEFAULT_LIMITS, RequestLimits

MAX_INTERNAL_MESSAGE_BYTES = 64 << 20
HANDSHAKE_MS = 10_000
INTERNAL_LIMITS = dataclasses.replace(DEFAULT_LIMITS, max_message_bytes=MAX_INTERNAL_MESSAGE_BYTES)


def server_options(
    *, is_public: bool, limits: RequestLimits | None = None, shares_port: bool = False
) -> list[tuple[str, int]]:
    """Channel arguments of a server; `is_public` for one that clients talk to, else between services. Without
    `limits`, the usual ones of that kind. With `shares_port`, other processes may listen on its port.

    `ping_timeout_ms` is what ends a connection whose peer is frozen: `keepalive_timeout_ms` alone lets it
    stay for a minute.
    """
    limits = limits or (DEFAULT_LIMITS if is_public else INTERNAL_LIMITS)
    keepalive_ms, timeout_ms = (30_000, 10_000) if is_public else (10_000, 3_000)
    options = [
        # Off unless asked for, or two servers share a port in silence.
        ("grpc.so_reuseport", int(shares_port)),
        # Soft and hard limit are the same: between two limits the library refuses at random.
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        # Until it has said what HTTP/2 begins with, TLS before it, a connection has no other clock.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Our own channels ping every 10 s; the library's default would answer that with GOAWAY.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 2),
    ]
    if is_public:
        options += [
            ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
            ("grpc.max_connection_age_ms", 1_800_000),
            ("grpc.max_connection_age_grace_ms", 1_800_000),
            ("grpc.max_connection_idle_ms", round(1000 * limits.max_idle_seconds)),
        ]
    return options


def channel_options(*, max_message_bytes: int = MAX_INTERNAL_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """Channel arguments of a client between services."""
    return [
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        # Without it a frozen peer is noticed after a minute, whatever the keepalive says.
        ("grpc.http2.ping_timeout_ms", 3_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Off: of a connection without calls the library's server allows one ping in two hours, whatever it
        # was told, and ends it at the fourth. A link between services always has a call.
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Two channels to one address are two connections.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A fixed window: probing would let a peer send megabytes ahead of a reader that has stopped.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 1 << 20),
    ]
