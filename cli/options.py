"""Options that several commands share, as dataclasses whose fields are typer options.

`flattened` lets a command take such a dataclass as one parameter. Unset options stay None: what is not
asked for is not sent, and the server's default holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from weft.v1 import generation_pb2 as generation

SAMPLING = "Sampling"


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw tokens and when to stop: the fields of weft.v1.SamplingParams, and stop strings."""

    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to draw.", rich_help_panel=SAMPLING)] = (
        None
    )
    min_tokens: Annotated[
        int | None, typer.Option(help="Tokens before any stop counts.", rich_help_panel=SAMPLING)
    ] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = None
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k likeliest; 0 keeps all.", rich_help_panel=SAMPLING)
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest up to this mass.", rich_help_panel=SAMPLING)
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Drop what is less likely than this times the likeliest.", rich_help_panel=SAMPLING
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=SAMPLING)] = (
        None
    )
    repetition_penalty: Annotated[float | None, typer.Option(rich_help_panel=SAMPLING)] = None
    presence_penalty: Annotated[float | None, typer.Option(rich_help_panel=SAMPLING)] = None
    frequency_penalty: Annotated[float | None, typer.Option(rich_help_panel=SAMPLING)] = None
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Repeatable.", rich_help_panel=SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string that ends the output; repeatable.", rich_help_panel=SAMPLING),
    ] = None
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(help="A token that ends the output; repeatable.", rich_help_panel=SAMPLING),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end.", rich_help_panel=SAMPLING)
    ] = False

    def to_proto(self, *, n: int | None = None, logprobs: int | None = None) -> generation.SamplingParams:
        """The message, with only what was asked for. Raises ValueError on what the wire cannot hold."""
        scalars = {
            name: value
            for name in (
                *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed"),
                *("repetition_penalty", "presence_penalty", "frequency_penalty"),
            )
            if (value := getattr(self, name)) is not None
        }
        message = generation.SamplingParams(
            **scalars,
            n=n,
            logprobs=logprobs,
            stop_token_ids=self.stop_token_id or (),
        )
        if self.ignore_eos:
            message.ignore_eos = True
        for entry in self.logit_bias or ():
            token_id, _, bias = entry.partition("=")
            message.logit_bias.add(token_id=int(token_id), bias=float(bias))
        return message


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is a dataclass of options by the dataclass's fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not (isinstance(hint, type) and is_dataclass(hint)):
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = hint
        types = get_type_hints(hint, include_extras=True)
        parameters.extend(
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
            )
            for f in fields(hint)
        )

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        built = {
            name: group(**{f.name: values.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper
