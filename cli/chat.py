"""`weft chat`: a conversation on the terminal. The history is kept here and sent whole each turn; with
`--session` the server keeps it.

The server finds the turns it has seen in its prefix cache, so a long conversation is not computed again.
"""

from __future__ import annotations

import sys
from typing import Annotated

import grpc
import typer

from cli.connection import ConnectionOptions, describe, fail, gateway, usage_errors
from cli.conversation import Conversation, LocalConversation, ServerConversation
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
    session: Annotated[
        str | None, typer.Option(metavar="ID", help="Let the server keep the conversation under this name.")
    ] = None,
) -> None:
    """Talk with a model; each line is a turn."""
    with usage_errors():
        if session == "":
            raise ValueError("--session: must not be empty")
        opening = [pb.ChatMessage(role="system", content=system)] if system else []
        request = pb.GenerateRequest(model=model, sampling=sampling.to_proto(), stop=sampling.stop or ())
    is_terminal = is_interactive()
    if is_terminal:
        typer.echo(HELP)
    with gateway(connection) as stub:
        history: Conversation = LocalConversation(opening)
        if session is not None:
            history = ServerConversation(stub, connection, session, model, opening)
        while (line := read_line("> " if is_terminal else "")) is not None:
            if line == "/exit":
                break
            if not line:
                continue
            answer = None
            try:
                if line == "/reset":
                    history.reset()
                    continue
                history.prepare(request, line)
                answer = stream_answer(stub, request, connection)
            except grpc.RpcError as error:
                if not is_terminal:
                    raise
                # Whoever sits there may ask again; the conversation so far stays.
                typer.echo(f"weft: {describe(error)}", err=True)
            history.answered(answer)


def is_interactive() -> bool:
    """Whether a person types the turns."""
    return sys.stdin.isatty()


def read_line(prompt: str) -> str | None:
    """One line without its surrounding blanks; None at the end of the input. Ends the command when it is no
    text.
    """
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        typer.echo()
        return None
    except UnicodeDecodeError as error:
        fail(f"stdin is not UTF-8: {error.reason}")
        raise  # not reached: fail raises


def stream_answer(
    stub: gateway_grpc.GatewayServiceStub, request: pb.GenerateRequest, connection: ConnectionOptions
) -> str | None:
    """Print the answer as it comes and return it; None when there is not one character of it.

    Raises grpc.RpcError, with the line that had begun ended.
    """
    call = stub.Generate(request, timeout=connection.timeout, metadata=connection.metadata)
    pieces: list[str] = []
    try:
        for event in call:
            pieces.append(event.delta.text)
            typer.echo(event.delta.text, nl=False)
    except KeyboardInterrupt:
        call.cancel()
    except grpc.RpcError:
        if any(pieces):
            typer.echo()
        raise
    typer.echo()
    return "".join(pieces) or None
