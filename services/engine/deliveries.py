"""What the engine's thread hands out: each link its own events, once a step.

Knows links and slots; knows no sequences, no transport, and not what a step is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import compress
from typing import cast

from services.engine.core.errors import RequestError
from services.engine.core.events import FinishedEvent, StepReport, Tokens

log = logging.getLogger("weft.engine.loop")


@dataclass(slots=True)
class LinkEvents:
    """What happened on one link since its last delivery. The int beside an event is its slot, and so are the
    keys of the tokens.
    """

    step: int
    accepted: list[int] = field(default_factory=list)
    rejected: list[tuple[int, RequestError]] = field(default_factory=list)
    tokens: Tokens = field(default_factory=Tokens)
    finished: list[tuple[int, FinishedEvent]] = field(default_factory=list)


Deliver = Callable[[LinkEvents], None]


class Deliveries:
    """The open links, their live slots, and what each is to be told next."""

    def __init__(self) -> None:
        self._deliver: dict[int, Deliver] = {}
        self._slots: dict[int, set[int]] = {}
        self._pending: dict[int, LinkEvents] = {}

    def open(self, link_id: int, deliver: Deliver) -> None:
        """A new link. What it is told is lost if `deliver` raises, and the link is closed."""
        self._deliver[link_id] = deliver
        self._slots[link_id] = set()

    def close(self, link_id: int) -> set[int]:
        """Tell a link nothing more; the slots that were live on it."""
        self._deliver.pop(link_id, None)
        self._pending.pop(link_id, None)
        return self._slots.pop(link_id, set())

    def is_open(self, link_id: int) -> bool:
        """Whether a link is told anything."""
        return link_id in self._deliver

    @property
    def has_pending(self) -> bool:
        """Whether any link is to be told anything."""
        return bool(self._pending)

    def accept(self, link_id: int, slot: int) -> None:
        """A slot of an open link is live from now on."""
        self._slots[link_id].add(slot)
        self._events(link_id).accepted.append(slot)

    def reject(self, link_id: int, slot: int, error: RequestError) -> None:
        """A slot of an open link was refused."""
        self._events(link_id).rejected.append((slot, error))

    def sort(self, report: StepReport) -> None:
        """Add a report's events to what each open link is told next."""
        if report.tokens:
            self._sort_tokens(report.tokens)
        for end in report.finished:
            link_id, slot = _link_and_slot(end.key)
            if link_id in self._deliver:
                self._slots[link_id].discard(slot)
                self._events(link_id).finished.append((slot, end))

    def send(self, step: int) -> list[int]:
        """Deliver. The links that failed to take it."""
        failed: list[int] = []
        pending, self._pending = self._pending, {}
        for link_id, events in pending.items():
            events.step = step
            try:
                self._deliver[link_id](events)
            except Exception:
                log.exception("delivery failed; closing link %d", link_id)
                failed.append(link_id)
        return failed

    def _events(self, link_id: int) -> LinkEvents:
        events = self._pending.get(link_id)
        if events is None:
            events = self._pending[link_id] = LinkEvents(0)
        return events

    def _sort_tokens(self, tokens: Tokens) -> None:
        """Give each link its rows. Mostly all are of one."""
        link_ids, slots = zip(*cast("list[tuple[int, int]]", tokens.keys), strict=True)
        if link_ids.count(link_ids[0]) == len(link_ids):
            if link_ids[0] in self._deliver:
                self._events(link_ids[0]).tokens.extend(tokens, slots)
            return
        for wanted in set(link_ids) & self._deliver.keys():
            is_its = [link_id == wanted for link_id in link_ids]
            self._events(wanted).tokens.extend(tokens.where(is_its), list(compress(slots, is_its)))


def _link_and_slot(key: Hashable) -> tuple[int, int]:
    """The key that the loop's `submit` gave."""
    link_id, slot = cast("tuple[int, int]", key)
    return link_id, slot
