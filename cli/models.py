"""`weft models`: what the gateway serves now."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Table

from cli.connection import ConnectionOptions, gateway
from cli.options import flattened
from weft.v1 import gateway_service_pb2 as pb


@flattened
def models(
    connection: ConnectionOptions,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """List the models that can be used now."""
    with gateway(connection) as stub:
        response = stub.ListModels(
            pb.ListModelsRequest(), timeout=connection.timeout or 10, metadata=connection.metadata
        )
    if as_json:
        for model in response.models:
            typer.echo(MessageToJson(model, indent=None, preserving_proto_field_name=True))
        return
    table = Table()
    for heading in ("model", "version", "context", "vocabulary", "deterministic"):
        table.add_column(heading, overflow="fold")
    for model in response.models:
        is_deterministic = "yes" if model.is_deterministic else "no"
        sizes = (str(model.max_model_len), str(model.vocab_size))
        table.add_row(model.name, model.version or "-", *sizes, is_deterministic)
    Console().print(table)
