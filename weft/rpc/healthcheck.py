"""`python -m weft.rpc.healthcheck HOST:PORT [--service NAME] [--timeout S]`: exit 0 when SERVING, else 1.
`--tls-ca FILE` checks a server with TLS; one that asks for certificates needs `--tls-cert` and `--tls-key`.

For container health checks: small, no key needed, one line of output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft.rpc.address import parse_address
from weft.rpc.channel import blocking_channel
from weft.rpc.tls import ChannelTls


def check(target: str, service: str, timeout_s: float, tls: ChannelTls | None = None) -> str:
    """The state of a service as a word: SERVING, NOT_SERVING, or the status code of a failed check. Raises
    TlsError.
    """
    with blocking_channel(target, tls, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main(argv: list[str] | None = None) -> int:
    """Check once and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m weft.rpc.healthcheck")
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument(
        "--service", default="", help='a service name, or "liveness"; empty asks for the whole server'
    )
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds to wait")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="authority of the server's certificate")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate to show")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="key of that certificate")
    parser.add_argument("--tls-name", metavar="NAME", help="name in the server's certificate")
    found = parser.parse_args(argv)
    if found.tls_ca is None and (found.tls_cert or found.tls_key or found.tls_name):
        parser.error("--tls-cert, --tls-key and --tls-name need --tls-ca")
    tls = ChannelTls(found.tls_ca, found.tls_cert, found.tls_key, found.tls_name) if found.tls_ca else None
    try:
        state = check(str(parse_address(found.target)), found.service, found.timeout, tls)
    except ValueError as error:
        parser.error(str(error))
    print(state)
    return 0 if state == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
