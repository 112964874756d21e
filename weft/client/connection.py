"""Channel arguments of a public client."""

from __future__ import annotations

OPTIONS = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without it a frozen server is noticed after a minute more.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 8 << 20),
    # One layer of retries: the one below, which knows what was delivered.
    ("grpc.enable_retries", 0),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

CALL_TIMEOUT_S = 30.0
