"""One call to the gateway or the job service: the channel, the key, the deadline, and how a failure is told.

A failure is one line on stderr that begins with the name of its gRPC status, and exit status 1. Ctrl-C
cancels the call, so that the server frees what it holds, and exits with 130.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from weft.config import variable
from weft.rpc.auth import auth_metadata
from weft.rpc.channel import blocking_channel, channel_options
from weft.rpc.tls import ChannelTls, TlsError
from weft.v1 import gateway_service_pb2_grpc as gateway_grpc
from weft.v1 import quantizer_service_pb2_grpc as quantizer_grpc

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
CONNECTION = "Connection"
SERVER = "127.0.0.1:50052"
JOB_SERVER = "127.0.0.1:50053"
_TLS_CA = typer.Option(
    metavar="FILE",
    help="Authority of the gateway's certificate, PEM: use TLS; else WEFT_TLS_CA.",
    rich_help_panel=CONNECTION,
)
_TLS_CERT = typer.Option(
    metavar="FILE", help="Certificate to show; else WEFT_TLS_CERT.", rich_help_panel=CONNECTION
)
_TLS_KEY = typer.Option(
    metavar="FILE", help="Key of that certificate; else WEFT_TLS_KEY.", rich_help_panel=CONNECTION
)
_TLS_NAME = typer.Option(
    metavar="NAME",
    help="Name in the gateway's certificate, where it is not the address; else WEFT_TLS_NAME.",
    rich_help_panel=CONNECTION,
)


@dataclass(frozen=True)
class ConnectionOptions:
    """Where the gateway is and who is calling."""

    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help=f"The gateway; else WEFT_SERVER, else {SERVER}.",
            rich_help_panel=CONNECTION,
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Sent as a bearer token; else WEFT_API_KEY.", rich_help_panel=CONNECTION
        ),
    ] = None
    tls_ca: Annotated[Path | None, _TLS_CA] = None
    tls_cert: Annotated[Path | None, _TLS_CERT] = None
    tls_key: Annotated[Path | None, _TLS_KEY] = None
    tls_name: Annotated[str | None, _TLS_NAME] = None
    timeout: Annotated[
        float | None,
        typer.Option(help="Deadline in seconds; output ends shortly before it.", rich_help_panel=CONNECTION),
    ] = None

    @property
    def target(self) -> str:
        """The gateway's address: flag, then variable, then default."""
        return self.server or variable("WEFT_SERVER") or SERVER

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The call's metadata. Raises typer.BadParameter for a key that no header can hold."""
        return _key_metadata(self.api_key or variable("WEFT_API_KEY"))

    @property
    def tls(self) -> ChannelTls | None:
        """How the gateway is known, each part from its flag or its variable; None without an authority.
        Raises typer.BadParameter.
        """
        ca, cert, key, name = (
            given or variable(f"WEFT_TLS_{part}")
            for given, part in (
                (self.tls_ca, "CA"),
                (self.tls_cert, "CERT"),
                (self.tls_key, "KEY"),
                (self.tls_name, "NAME"),
            )
        )
        if ca is None:
            if cert or key or name:
                raise typer.BadParameter("--tls-cert, --tls-key and --tls-name need --tls-ca")
            return None
        return ChannelTls(
            Path(ca), Path(cert) if cert else None, Path(key) if key else None, str(name) if name else None
        )


@dataclass(frozen=True)
class JobServiceOptions:
    """Where the quantizer's job service is and who is calling."""

    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help=f"The job service; else WEFT_JOB_SERVER, else {JOB_SERVER}.",
            rich_help_panel=CONNECTION,
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Sent as a bearer token; else WEFT_API_KEY.", rich_help_panel=CONNECTION
        ),
    ] = None

    @property
    def target(self) -> str:
        """The service's address: flag, then variable, then default."""
        return self.server or variable("WEFT_JOB_SERVER") or JOB_SERVER

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The call's metadata. Raises typer.BadParameter for a key that no header can hold."""
        return _key_metadata(self.api_key or variable("WEFT_API_KEY"))


def _key_metadata(given: str | None) -> tuple[tuple[str, str], ...]:
    # A key read from a file brings the file's line end along.
    key = (given or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise typer.BadParameter("the API key holds characters that a header cannot")
    return auth_metadata(key)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """What a message cannot hold - a number too large, an argument that is not UTF-8 - is a wrong option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextlib.contextmanager
def gateway(options: ConnectionOptions) -> Iterator[gateway_grpc.GatewayServiceStub]:
    """A stub on a channel that is closed at the end; a failed call ends the command with its one line."""
    with _channel(options) as channel:
        try:
            yield gateway_grpc.GatewayServiceStub(channel)
        except grpc.RpcError as error:
            fail(describe(error))


def _channel(options: ConnectionOptions) -> grpc.Channel:
    try:
        return blocking_channel(options.target, options.tls, channel_options())
    except TlsError as error:
        raise typer.BadParameter(str(error)) from error


@contextlib.contextmanager
def job_service(options: JobServiceOptions) -> Iterator[quantizer_grpc.QuantizerServiceStub]:
    """The same for the job service."""
    with grpc.insecure_channel(options.target, options=channel_options()) as channel:
        try:
            yield quantizer_grpc.QuantizerServiceStub(channel)
        except grpc.RpcError as error:
            fail(describe(error))


def describe(error: grpc.RpcError) -> str:
    """STATUS: message, with the fields at fault when the server names them; always one line."""
    if not isinstance(error, grpc.Call):
        return f"UNKNOWN: {error}"
    message = error.details() or ""
    violations = [
        f"{violation.field}: {violation.description}"
        for violation in _bad_fields(error)
        if violation.description not in message
    ]
    return " ".join(f"{error.code().name}: {'; '.join([message, *violations])}".split())


def fail(message: str) -> None:
    """Say what went wrong on one line of stderr and end the command."""
    typer.echo(f"weft: {message}", err=True)
    raise typer.Exit(EXIT_FAILURE)


def _bad_fields(error: grpc.Call) -> list[error_details_pb2.BadRequest.FieldViolation]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the call's own status: show the status alone
        return []
    bad_request = error_details_pb2.BadRequest()
    return [
        violation
        for detail in (status.details if status else ())
        if detail.Unpack(bad_request)
        for violation in bad_request.field_violations
    ]
