"""`weft chat`: a conversation on the terminal. The history is kept here and sent whole each turn.

The server finds the turns it has seen in its prefix cache, so a long conversation is not computed again.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cli.connection import ConnectionOptions, gateway
from cli.options import SamplingOptions, flattened
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import gateway_service_pb2_grpc as gateway_grpc

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@flattened
def chat(
    sampling: SamplingOptions,
    connection: ConnectionOptions,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    model: Annotated[str, typer.Option(help="Needed only where there are several.")] = "",
) -> None:
    """Talk with a model; each line is a turn."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        typer.echo(HELP)
    opening = [pb.ChatMessage(role="system", content=system)] if system else []
    history = list(opening)
    with gateway(connection) as stub:
        while (line := read_line("> " if is_terminal else "")) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                history = list(opening)
                continue
            if not line:
                continue
            history.append(pb.ChatMessage(role="user", content=line))
            answer = stream_answer(stub, history, sampling, connection, model)
            if answer is None:
                history.pop()
            else:
                history.append(pb.ChatMessage(role="assistant", content=answer))


def read_line(prompt: str) -> str | None:
    """One line without its surrounding blanks; None at the end of the input."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        typer.echo()
        return None


def stream_answer(
    stub: gateway_grpc.GatewayServiceStub,
    history: list[pb.ChatMessage],
    sampling: SamplingOptions,
    connection: ConnectionOptions,
    model: str,
) -> str | None:
    """Print the answer as it comes and return it; None when Ctrl-C stopped it before the first character.

    Raises grpc.RpcError.
    """
    request = pb.GenerateRequest(model=model, chat=pb.ChatPrompt(messages=history), stop=sampling.stop or ())
    request.sampling.CopyFrom(sampling.to_proto())
    call = stub.Generate(request, timeout=connection.timeout, metadata=connection.metadata)
    pieces: list[str] = []
    try:
        for event in call:
            pieces.append(event.delta.text)
            typer.echo(event.delta.text, nl=False)
    except KeyboardInterrupt:
        call.cancel()
    typer.echo()
    return "".join(pieces) or None
