"""What a link to an engine is told and tells: times, how it ends, whom it reports to. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from services.gateway.streams.live import LiveSample
from weft.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from services.gateway.links.engine_client import EngineLink


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """How long the link waits for what, in seconds. `hung_s` and the 200 ms between two heartbeats are less
    than a second together.
    """

    hello_s: float = 5.0
    dead_s: float = 1.0
    hung_s: float = 0.75
    tick_s: float = 0.1
    min_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    refused_backoff_s: float = 5.0


class LinkLost(Exception):
    """The link ended. The text says why."""


class LinkLeft(Exception):
    """The link was given up on purpose, with nothing on it."""


class EngineRefused(Exception):
    """The engine that answered is not one this gateway may use."""


class LinkOwner(Protocol):
    """Who is told what happens on a link: the router."""

    def on_link_change(self, link: EngineLink) -> None:
        """The link came up, went down, or takes no more."""

    def on_room(self, link: EngineLink) -> None:
        """The engine may have more room than before."""

    def on_lost(self, sample: LiveSample, *, is_blamed: bool) -> None:
        """A sample lost its slot; `is_blamed`: perhaps by its own fault."""

    def on_refused(self, sample: LiveSample, failure: pb.Failure, target: str) -> None:
        """The engine at `target` has no room for the sample."""
