"""The flags of `weft bench` as dataclasses of typer options, and the settings they come to."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.bench.settings import (
    Load,
    ServerSettings,
    Settings,
    SettingsError,
    WorkloadSettings,
    check,
    parse_numbers,
    parse_range,
    parse_target,
)
from cli.connection import ConnectionOptions

DEFAULT_REQUESTS = 100
DEFAULT_CONCURRENCY = 8
DEFAULT_TIMEOUT_S = 600.0
LOAD, WORKLOAD, HTTP, OUTPUT = "Load", "Workload", "Protocol", "Output"


def _option(panel: str, help: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar)


@dataclass(frozen=True)
class LoadOptions:
    """How requests come, and how many."""

    concurrency: Annotated[
        str | None, _option(LOAD, "Closed loop: so many requests at once; several to sweep.", metavar="N,...")
    ] = None
    rate: Annotated[
        str | None, _option(LOAD, "Open loop: so many requests a second; several to sweep.", metavar="R,...")
    ] = None
    requests: Annotated[
        int | None, _option(LOAD, f"Requests for each load; {DEFAULT_REQUESTS} unless --duration is given.")
    ] = None
    duration: Annotated[
        float | None, _option(LOAD, "Send for so many seconds instead; what runs then is waited for.")
    ] = None
    warmup: Annotated[int, _option(LOAD, "Requests before each load that are not counted.")] = 0
    arrivals: Annotated[str, _option(LOAD, "Open loop: poisson, constant or gamma.")] = "poisson"
    burstiness: Annotated[
        float, _option(LOAD, "Shape of gamma arrivals: below 1 bursts, 1 is poisson, above 1 more even.")
    ] = 1.0
    max_concurrency: Annotated[
        int | None, _option(LOAD, "Open loop: requests at once; waiting for it counts as latency.")
    ] = None
    cancel_fraction: Annotated[
        float, _option(LOAD, "Share of requests cancelled after some of their tokens; reported apart.")
    ] = 0.0
    slow_readers: Annotated[
        float, _option(LOAD, "Share of requests that read with a pause; reported apart.")
    ] = 0.0
    slow_pause: Annotated[float, _option(LOAD, "Seconds a slow reader pauses after each message.")] = 0.2
    processes: Annotated[int, _option(LOAD, "Client processes that share the load.")] = 1


@dataclass(frozen=True)
class WorkloadOptions:
    """What is asked."""

    workload: Annotated[
        str, _option(WORKLOAD, "fixed, random, shared-prefix, multi-turn, trace or text.")
    ] = "fixed"
    input_tokens: Annotated[
        str | None,
        _option(WORKLOAD, "Length of a prompt; a range LOW:HIGH. 128, random 32:512.", metavar="N"),
    ] = None
    output_tokens: Annotated[
        str | None,
        _option(WORKLOAD, "Length of an answer; a range LOW:HIGH. 128, random 16:256.", metavar="N"),
    ] = None
    prefix_groups: Annotated[int, _option(WORKLOAD, "shared-prefix: how many prefixes there are.")] = 8
    prefix_tokens: Annotated[
        int, _option(WORKLOAD, "shared-prefix: length of a prefix; --input-tokens come behind it.")
    ] = 512
    turns: Annotated[int, _option(WORKLOAD, "multi-turn: requests of a conversation.")] = 4
    think_time: Annotated[float, _option(WORKLOAD, "multi-turn: seconds between answer and next turn.")] = 0.0
    file: Annotated[
        Path | None,
        _option(WORKLOAD, "trace: TIMESTAMP,ContextTokens,GeneratedTokens. text: prompts."),
    ] = None
    time_scale: Annotated[
        float, _option(WORKLOAD, "trace: its times are multiplied by it; 0.1 is ten times as fast.")
    ] = 1.0
    trace_limit: Annotated[int | None, _option(WORKLOAD, "trace: only the first so many requests.")] = None
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Answers of the full length; on, except for text.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None
    temperature: Annotated[float | None, _option(WORKLOAD, "Else the server's default.")] = None
    max_model_len: Annotated[
        int | None, _option(WORKLOAD, "Context of the model, where the server does not tell.")
    ] = None
    seed: Annotated[int, _option(WORKLOAD, "Prompts, arrivals and draws are the same for the same seed.")] = 1


@dataclass(frozen=True)
class ProtocolOptions:
    """How to ask."""

    url: Annotated[
        str | None, _option(HTTP, "HTTP instead of gRPC: base address of an OpenAI-compatible server.")
    ] = None
    endpoint: Annotated[str, _option(HTTP, "completions or chat.")] = "completions"
    extra_body: Annotated[
        str | None, _option(HTTP, "More fields for each HTTP request, as a JSON object.", metavar="JSON")
    ] = None
    multiplex: Annotated[
        bool, typer.Option("--multiplex", help="gRPC: all requests on one stream.", rich_help_panel=HTTP)
    ] = False
    connections: Annotated[
        int | None, _option(HTTP, "gRPC connections of a process; one for 64 requests at once, at most 8.")
    ] = None
    model: Annotated[str, _option(HTTP, "Needed only where there are several.")] = ""
    cache_salt: Annotated[
        str | None,
        _option(HTTP, "gRPC: prefix cache to use; a new one each run unless given. '' is everybody's."),
    ] = None


def make_settings(
    load: LoadOptions,
    workload: WorkloadOptions,
    protocol: ProtocolOptions,
    connection: ConnectionOptions,
    goodput: list[str],
) -> Settings:
    """The settings, checked. Raises SettingsError and typer.BadParameter."""
    settings = Settings(
        server=_server(protocol, connection),
        loads=_loads(load, workload.workload),
        workload=_workload(workload),
        num_requests=_num_requests(load, workload.workload),
        duration_s=load.duration,
        num_warmup=load.warmup,
        arrivals=load.arrivals,
        burstiness=load.burstiness,
        max_concurrency=load.max_concurrency,
        targets=tuple(parse_target(text) for text in goodput),
        cancel_fraction=load.cancel_fraction,
        slow_fraction=load.slow_readers,
        slow_pause_s=load.slow_pause,
        timeout_s=DEFAULT_TIMEOUT_S if connection.timeout is None else connection.timeout,
        seed=workload.seed,
        cache_salt=uuid.uuid4().hex if protocol.cache_salt is None else protocol.cache_salt,
        num_processes=load.processes,
        max_model_len=workload.max_model_len,
    )
    check(settings)
    return settings


def _server(protocol: ProtocolOptions, connection: ConnectionOptions) -> ServerSettings:
    if protocol.url is not None and connection.server is not None:
        raise SettingsError("give --url (HTTP) or --server (gRPC), not both")
    if protocol.endpoint not in ("completions", "chat"):
        raise SettingsError("--endpoint is completions or chat")
    if protocol.cache_salt is not None and protocol.url is not None:
        raise SettingsError("--cache-salt is for gRPC; over HTTP it is a field of --extra-body")
    if protocol.connections is not None and not 1 <= protocol.connections <= 256:
        raise SettingsError("--connections must be 1 to 256")
    if protocol.connections is not None and protocol.url is not None:
        raise SettingsError("--connections is for gRPC; over HTTP each request in flight has one")
    tls = connection.tls
    bearer = dict(connection.metadata).get("authorization", "")
    return ServerSettings(
        target=connection.target,
        url=protocol.url,
        endpoint=protocol.endpoint,
        is_multiplexed=protocol.multiplex,
        model=protocol.model,
        api_key=bearer.removeprefix("Bearer "),
        tls_ca=tls.ca if tls else None,
        tls_cert=tls.cert if tls else None,
        tls_key=tls.key if tls else None,
        tls_name=tls.name if tls else None,
        num_channels=protocol.connections,
        extra_body=_json_object(protocol.extra_body),
    )


def _json_object(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise SettingsError("--extra-body must be a JSON object")
    return found


def _loads(load: LoadOptions, workload: str) -> tuple[Load, ...]:
    found: list[Load] = []
    if load.concurrency is not None:
        numbers = parse_numbers(load.concurrency, "--concurrency", int)
        found += [Load(concurrency=int(value)) for value in numbers]
    if load.rate is not None:
        found += [Load(rate=float(value)) for value in parse_numbers(load.rate, "--rate", float)]
    if found:
        return tuple(found)
    return (Load(),) if workload == "trace" else (Load(concurrency=DEFAULT_CONCURRENCY),)


def _num_requests(load: LoadOptions, workload: str) -> int | None:
    if load.requests is not None or load.duration is not None or workload == "trace":
        return load.requests
    return DEFAULT_REQUESTS


def _workload(options: WorkloadOptions) -> WorkloadSettings:
    is_random, is_text = options.workload == "random", options.workload == "text"
    for name, value in (("--input-tokens", options.input_tokens), ("--output-tokens", options.output_tokens)):
        if value is not None and (options.workload == "trace" or (is_text and name == "--input-tokens")):
            raise SettingsError(f"{name} has no meaning for --workload {options.workload}: the file says")
    inputs = options.input_tokens or ("32:512" if is_random else "128")
    outputs = options.output_tokens or ("16:256" if is_random else "128")
    return WorkloadSettings(
        kind=options.workload,
        input_tokens=parse_range(inputs, "--input-tokens"),
        output_tokens=parse_range(outputs, "--output-tokens"),
        prefix_groups=options.prefix_groups,
        prefix_tokens=options.prefix_tokens,
        turns=options.turns,
        think_s=options.think_time,
        path=str(options.file) if options.file else None,
        time_scale=options.time_scale,
        trace_limit=options.trace_limit,
        is_ignoring_eos=(not is_text) if options.ignore_eos is None else options.ignore_eos,
        temperature=options.temperature,
    )
