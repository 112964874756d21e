"""In which order Cached blocks are evicted.

Least recently used first; blocks that are retained come after all others until their time is over. Retention
is a hint: a retained block is evicted when nothing else is left, and no more than a bounded number is
retained at once. Knows neither what blocks hold nor who owned them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from time import monotonic

from services.engine.core.block import Block
from services.engine.core.errors import IntegrityError

LAPSE_INTERVAL_S = 1.0
"""How often retained blocks are looked through for those whose time is over."""


class EvictionOrder:
    """The Cached blocks. `now` is a monotonic clock in seconds.

    Three queues, oldest first: plain blocks, lapsed ones (retained once, not any more) and retained ones. The
    older of the first two heads goes first. Beyond `max_retained` blocks the oldest retained ones lapse, and
    since a sequence gives its tail back before its head, what is left of it is a head that can be found.
    """

    def __init__(self, max_retained: int, now: Callable[[], float] = monotonic) -> None:
        self.max_retained = max_retained
        self._now = now
        self._plain: OrderedDict[int, Block] = OrderedDict()
        self._lapsed: OrderedDict[int, Block] = OrderedDict()
        self._retained: OrderedDict[int, Block] = OrderedDict()
        self._num_added = 0
        self._looked_at = now()

    def __len__(self) -> int:
        return len(self._plain) + len(self._lapsed) + len(self._retained)

    def checked(self) -> Iterator[int]:
        """Every block's index. Raises IntegrityError when one is listed twice, or too many are retained."""
        found = set(chain(self._plain, self._lapsed, self._retained))
        if len(found) != len(self) or self.num_retained > self.max_retained:
            raise IntegrityError(
                f"{len(self)} blocks listed, {len(found)} cached, {self.num_retained} retained"
            )
        return iter(found)

    @property
    def num_retained(self) -> int:
        """Blocks that are evicted last."""
        return len(self._retained)

    def retain(self, blocks: Iterable[Block], seconds: float) -> None:
        """Ask that blocks be evicted last for so long; a longer time asked for before stays."""
        until = self._now() + seconds
        for block in blocks:
            block.retained_until = max(block.retained_until, until)

    def add(self, block: Block) -> None:
        """A block that has become Cached: the most recently used one."""
        self._num_added += 1
        block.cached_at = self._num_added
        if not block.retained_until or block.retained_until <= self._now():
            block.retained_until = 0.0
            self._plain[block.index] = block
            return
        self._retained[block.index] = block
        if len(self._retained) > self.max_retained:
            _, oldest = self._retained.popitem(last=False)
            self._lapse(oldest)

    def remove(self, block: Block) -> None:
        """A block that is owned again. How long it is retained stays with it."""
        for queue in (self._plain, self._retained, self._lapsed):
            if queue.pop(block.index, None) is not None:
                return
        raise KeyError(block.index)

    def evict(self) -> Block:
        """Take out the block to go first. Raises KeyError when there is none."""
        self._look_through()
        queue = self._plain or self._lapsed or self._retained
        if self._plain and self._lapsed:
            heads = (next(iter(q.values())).cached_at for q in (self._plain, self._lapsed))
            queue = self._plain if next(heads) < next(heads) else self._lapsed
        _, block = queue.popitem(last=False)
        block.retained_until = 0.0
        return block

    def _look_through(self) -> None:
        now = self._now()
        if not self._retained or now - self._looked_at < LAPSE_INTERVAL_S:
            return
        self._looked_at = now
        over = [block for block in self._retained.values() if block.retained_until <= now]
        for block in over:
            del self._retained[block.index]
            self._lapse(block)

    def _lapse(self, block: Block) -> None:
        block.retained_until = 0.0
        self._lapsed[block.index] = block
