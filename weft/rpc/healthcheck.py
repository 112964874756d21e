"""`python -m weft.rpc.healthcheck HOST:PORT [--service NAME] [--timeout S]`: exit 0 when SERVING, else 1.

For container health checks: small, no key needed, one line of output.
"""

from __future__ import annotations

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft.rpc.address import parse_address


def check(target: str, service: str, timeout_s: float) -> str:
    """The state of a service as a word: SERVING, NOT_SERVING, or the status code of a failed check."""
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
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
    arguments = parser.parse_args(argv)
    try:
        target = str(parse_address(arguments.target))
    except ValueError as error:
        parser.error(str(error))
    state = check(target, arguments.service, arguments.timeout)
    print(state)
    return 0 if state == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
