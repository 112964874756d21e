"""Who is next: the class of priority first, then the key that has been served least, then arrival.

Fairness by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a
counter per key grows with the service it gets, divided by its weight; the least counter goes next; a key
that begins to wait is lifted to the least counter of those that wait already, so that idling saves nothing
up. Then the service of two keys that both keep waiting differs by no more than twice what the running
requests can hold. Told the time; knows neither requests, nor engines, nor what the service is.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

CLASSES = ("interactive", "normal", "batch")
# While better classes keep everything busy, so many starts in all hold one of a class that waits too long.
OVERDUE_EVERY = 8
# Keys remembered that wait for nothing.
MAX_IDLE_KEYS = 4096

T = TypeVar("T")


def class_of(priority: int) -> int:
    """The index into CLASSES: interactive below 0, normal at 0, batch above."""
    return 0 if priority < 0 else 1 if priority == 0 else 2


@dataclass(eq=False, slots=True)
class Entry(Generic[T]):
    """What waits. `number` is its place by arrival, `rank` its class."""

    item: T
    key: KeyQueue[T]
    number: int
    arrival: float
    rank: int
    is_queued: bool = True


@dataclass(eq=False, slots=True)
class KeyQueue(Generic[T]):
    """One key: its counter, and per class what of it waits, oldest first."""

    name: str | None
    weight: float = 1.0
    counter: float = 0.0
    lanes: tuple[Lane[T], ...] = field(default_factory=lambda: tuple(Lane() for _ in CLASSES))

    @property
    def is_waiting(self) -> bool:
        """Whether anything of it waits."""
        return any(lane.num_queued for lane in self.lanes)


@dataclass(eq=False, slots=True)
class Lane(Generic[T]):
    """Entries in order of arrival. The first one waits; of those behind it, some may have left."""

    entries: deque[Entry[T]] = field(default_factory=deque)
    num_queued: int = 0
    is_ordered: bool = False

    def add(self, entry: Entry[T]) -> None:
        """One more."""
        self.entries.append(entry)
        self.num_queued += 1

    def settle(self) -> None:
        """An entry of it has left."""
        entries = self.entries
        self.num_queued -= 1
        while entries and not entries[0].is_queued:
            entries.popleft()
        if len(entries) > 64 + 2 * self.num_queued:
            self.entries = deque(entry for entry in entries if entry.is_queued)


class FairQueue(Generic[T]):
    """A queue that keeps nobody waiting for ever: once the oldest of a class has waited `ageing_s`, one start
    in OVERDUE_EVERY is its class's, and within a class the counters of the others pass its own.
    """

    def __init__(self, *, ageing_s: float = 10.0) -> None:
        self._ageing_s = ageing_s
        self._keys: dict[str | None, KeyQueue[T]] = {}
        self._classes: tuple[Lane[T], ...] = tuple(Lane() for _ in CLASSES)
        # Per class (counter, number of the oldest entry, key), least first, each key once. Both numbers only
        # grow, so a tuple that is out of date comes up too early, never too late, and is put right then.
        self._orders: tuple[list[tuple[float, int, KeyQueue[T]]], ...] = tuple([] for _ in CLASSES)
        self._last_served: KeyQueue[T] | None = None
        self._next_number = 0
        self._starts_since_overdue = 0

    def __len__(self) -> int:
        return sum(lane.num_queued for lane in self._classes)

    def num_queued(self, rank: int) -> int:
        """How many of a class wait."""
        return self._classes[rank].num_queued

    def key(self, name: str | None, weight: float = 1.0) -> KeyQueue[T]:
        """The key of this name, from now on with this weight."""
        queue = self._keys.get(name)
        if queue is None:
            self._forget()
            queue = self._keys[name] = KeyQueue(name)
        queue.weight = weight
        return queue

    def charge(self, queue: KeyQueue[T], amount: float) -> None:
        """Add service to a key."""
        queue.counter += amount / queue.weight

    def push(self, item: T, queue: KeyQueue[T], *, rank: int, now: float) -> Entry[T]:
        """Queue `item` for a key. `now` is in seconds and never goes back."""
        lane = queue.lanes[rank]
        if not lane.num_queued:
            self._lift(queue, rank)
        entry = Entry(item, queue, self._next_number, now, rank)
        self._next_number += 1
        lane.add(entry)
        self._classes[rank].add(entry)
        self._order(queue, rank)
        return entry

    def pop(self, now: float) -> Entry[T] | None:
        """Take out who is next; None only when nobody waits. What it costs is for the caller to charge before
        the next `pop`.
        """
        best = next((rank for rank, lane in enumerate(self._classes) if lane.num_queued), None)
        if best is None:
            return None
        overdue = self._overdue(best, now)
        self._starts_since_overdue += 1
        if overdue is not None and self._starts_since_overdue >= OVERDUE_EVERY:
            self._starts_since_overdue = 0
            best = overdue
        queue = self._first(best)
        if queue is None:
            raise RuntimeError("a class with entries has no key in its order")
        entry = queue.lanes[best].entries[0]
        self.remove(entry)
        self._last_served = queue
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Take an entry out. May come twice."""
        if not entry.is_queued:
            return
        entry.is_queued = False
        entry.key.lanes[entry.rank].settle()
        self._classes[entry.rank].settle()

    def num_before(self, queue: KeyQueue[T], rank: int) -> int:
        """How many would be popped before a request that this key queued now, if no more came and all cost
        the same: all of better classes, and of its own class as many of every key as it has itself.
        """
        own = queue.lanes[rank].num_queued
        others = (min(q.lanes[rank].num_queued, own + 1) for q in self._keys.values() if q is not queue)
        return sum(lane.num_queued for lane in self._classes[:rank]) + own + sum(others)

    def _overdue(self, best: int, now: float) -> int | None:
        """The class behind the best one whose oldest entry waits too long, and longest."""
        limit = now - self._ageing_s
        heads = (lane.entries[0] for lane in self._classes[best + 1 :] if lane.num_queued)
        return min(((e.number, e.rank) for e in heads if e.arrival <= limit), default=(0, None))[1]

    def _order(self, queue: KeyQueue[T], rank: int) -> None:
        lane = queue.lanes[rank]
        if lane.num_queued and not lane.is_ordered:
            lane.is_ordered = True
            heapq.heappush(self._orders[rank], (queue.counter, lane.entries[0].number, queue))

    def _first(self, rank: int) -> KeyQueue[T] | None:
        """The key that is next in this class."""
        order = self._orders[rank]
        while order:
            counter, number, queue = order[0]
            lane = queue.lanes[rank]
            if lane.num_queued and (queue.counter, lane.entries[0].number) == (counter, number):
                return queue
            heapq.heappop(order)
            lane.is_ordered = False
            self._order(queue, rank)
        return None

    def _lift(self, queue: KeyQueue[T], rank: int) -> None:
        """A key begins to wait in a class: what it did not use before is gone."""
        other = self._first(rank) or self._last_served
        if other is not None:
            queue.counter = max(queue.counter, other.counter)

    def _forget(self) -> None:
        """Keep the number of keys bounded: of those that wait for nothing, the least served go, since they
        would be lifted anyway.
        """
        if len(self._keys) < MAX_IDLE_KEYS:
            return
        idle = sorted((q for q in self._keys.values() if not q.is_waiting), key=lambda q: q.counter)
        for queue in idle[: max(1, len(idle) // 2)]:
            del self._keys[queue.name]
        for rank, order in enumerate(self._orders):
            for _, _, queue in order:
                queue.lanes[rank].is_ordered = queue.lanes[rank].num_queued > 0
            order[:] = [known for known in order if known[2].lanes[rank].is_ordered]
            heapq.heapify(order)
