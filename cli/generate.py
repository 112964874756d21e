"""`weft generate`: one prompt in, its completion streamed out."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson

from cli.connection import EXIT_INTERRUPTED, ConnectionOptions, fail, gateway, usage_errors
from cli.options import SamplingOptions, flattened
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as generation

REQUEST = "Request"


@flattened
def generate(
    sampling: SamplingOptions,
    connection: ConnectionOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; '-' or nothing reads stdin.")
    ] = None,
    model: Annotated[str, typer.Option(help="Needed only where there are several.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's turn.")] = False,
    token_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="A prompt of token ids instead of text.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Samples to draw.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities on stderr: of the token (0), or the top k as well.")
    ] = None,
    request_id: Annotated[str, typer.Option(rich_help_panel=REQUEST)] = "",
    priority: Annotated[int, typer.Option(help="Lower runs first.", rich_help_panel=REQUEST)] = 0,
    must_complete: Annotated[
        bool,
        typer.Option(
            "--must-complete", help="Refuse unless all tokens fit the deadline.", rich_help_panel=REQUEST
        ),
    ] = False,
    cache_salt: Annotated[
        str, typer.Option(help="Keep the prefix cache apart.", rich_help_panel=REQUEST)
    ] = "",
    show_special_tokens: Annotated[
        bool, typer.Option("--show-special-tokens", rich_help_panel=REQUEST)
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Usage and timings on stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON event per line.")] = False,
) -> None:
    """Stream the completion of a prompt."""
    with usage_errors():
        request = pb.GenerateRequest(
            model=model,
            sampling=sampling.to_proto(n=n, logprobs=logprobs),
            stop=sampling.stop or (),
            request_id=request_id,
            priority=priority,
            must_complete=must_complete,
            cache_salt=cache_salt,
        )
        if show_special_tokens:
            request.skip_special_tokens = False
        set_prompt(request, prompt, chat=chat, token_ids=token_ids)
    with gateway(connection) as stub:
        call = stub.Generate(request, timeout=connection.timeout, metadata=connection.metadata)
        try:
            if as_json:
                show_json(call)
            elif (n or 1) > 1:
                show_samples(call, has_stats=stats)
            else:
                show_sample(call, has_stats=stats)
        except KeyboardInterrupt:
            call.cancel()
            raise typer.Exit(EXIT_INTERRUPTED) from None


def set_prompt(request: pb.GenerateRequest, prompt: str | None, *, chat: bool, token_ids: str | None) -> None:
    """Fill the request's prompt from the argument, the ids or stdin. Raises typer.BadParameter or
    ValueError.
    """
    if token_ids is not None:
        if prompt is not None or chat:
            raise typer.BadParameter("--token-ids takes the place of the prompt")
        request.token_ids.ids.extend(int(part) for part in token_ids.split(","))
        return
    text = read_stdin() if prompt in (None, "-") else prompt or ""
    if chat:
        request.chat.messages.add(role="user", content=text)
    else:
        request.text = text


def read_stdin() -> str:
    """All of stdin as text, without the line end that a shell adds."""
    if sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give one as an argument or on stdin")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        fail(f"stdin is not UTF-8: {error.reason} at byte {error.start}")
        raise  # not reached: fail raises


def show_json(events: Iterable[pb.GenerateResponse]) -> None:
    """Print each event as it comes, one line each."""
    for event in events:
        typer.echo(MessageToJson(event, indent=None, preserving_proto_field_name=True))


def show_sample(events: Iterable[pb.GenerateResponse], *, has_stats: bool) -> None:
    """Stream the text of the one sample; the line is ended whatever ends the stream."""
    is_line_open = False
    finish: pb.Finish | None = None
    try:
        for event in events:
            show_logprobs(event.delta)
            typer.echo(event.delta.text, nl=False)
            is_line_open |= bool(event.delta.text)
            if event.HasField("finish"):
                finish = event.finish
    finally:
        if is_line_open or finish is not None:
            typer.echo()
    if has_stats and finish is not None:
        typer.echo(summary(finish), err=True)


def show_samples(events: Iterable[pb.GenerateResponse], *, has_stats: bool) -> None:
    """Print several samples one after the other as they end."""
    texts: dict[int, list[str]] = defaultdict(list)
    for event in events:
        if event.HasField("delta"):
            show_logprobs(event.delta)
            texts[event.delta.sample_index].append(event.delta.text)
        elif event.HasField("finish"):
            index = event.finish.sample_index
            typer.echo(f"--- sample {index}\n{''.join(texts.pop(index, []))}")
            if has_stats:
                typer.echo(summary(event.finish), err=True)


def show_logprobs(delta: pb.Delta) -> None:
    """Print the log-probabilities that came, one token a line."""
    for position in delta.logprobs:
        top = "  ".join(f"{token.text!r} {token.logprob:.3f}" for token in position.top)
        typer.echo(
            f"{position.chosen.text!r} {position.chosen.logprob:.3f}" + (f"  |  {top}" if top else ""),
            err=True,
        )


def summary(finish: pb.Finish) -> str:
    """One line on how a sample ended and what it took."""
    usage, receipt = finish.usage, finish.receipt
    reason = generation.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
    stop = f" at {finish.stop_string!r}" if finish.stop_string else ""
    return (
        f"[{reason}{stop}] {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.completion_tokens} completion tokens; queued {receipt.queue_ms:.0f} ms, "
        f"first token {receipt.first_token_ms:.0f} ms, total {receipt.total_ms:.0f} ms, "
        f"{receipt.preemptions} preemptions"
    )
