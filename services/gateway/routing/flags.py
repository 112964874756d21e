"""The flags of routing: where engines are, and how versions share a model's requests. Part of the gateway's
configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.links.discovery import DNS_PERIOD_S, FixedSource, parse_source
from services.gateway.routing.versions import VersionWeight, parse_version_weights
from weft.config import ConfigError, option

REPEATABLE = ("--engine", "--version-weight")


@dataclass(frozen=True)
class RoutingFlags:
    """What routing needs besides the engines."""

    version_weight: tuple[VersionWeight, ...] = option(
        (),
        "the share of a model's requests that a version gets; may be given several times; what is left goes "
        "to the other versions in proportion to what their engines can run at once",
        parse=parse_version_weights,
        metavar="MODEL@VERSION=PERCENT%",
    )
    engine_resolve_seconds: float = option(DNS_PERIOD_S, "how often the name of a dns: engine is resolved")


def check_routing_flags(flags: RoutingFlags) -> None:
    """Raises ConfigError, naming the flag."""
    if flags.engine_resolve_seconds <= 0:
        raise ConfigError("--engine-resolve-seconds", "must be above 0")


def parse_engines(text: str) -> tuple[str, ...]:
    """HOST:PORT, dns:NAME:PORT or file:PATH, or several with commas between. Raises ValueError."""
    found = []
    for part in (part.strip() for part in text.split(",")):
        if part:
            source = parse_source(part)
            found.append(str(source.address) if isinstance(source, FixedSource) else part)
    return tuple(found)


def merge_repeated(argv: Sequence[str]) -> list[str]:
    """Several `--engine X` as one `--engine X,Y`, and so for each flag that may be given several times."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in REPEATABLE:
            found.setdefault(flag, []).append(value if equals else next(arguments, ""))
        else:
            rest.append(argument)
    for flag, values in found.items():
        rest += [flag, ",".join(values)]
    return rest
