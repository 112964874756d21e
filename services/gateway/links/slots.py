"""What the samples on a link may ask of it, up or not. Knows the slots of the present epoch, not how they
travel.
"""

from __future__ import annotations

from services.gateway.links.multiplexer import Multiplexer
from services.gateway.streams.live import LiveSample


class LinkSlots:
    """The slots of a link, while there are any: every verb does nothing while the link is down."""

    def __init__(self) -> None:
        self._multiplexer: Multiplexer | None = None
        self._paused: set[LiveSample] = set()

    @property
    def is_up(self) -> bool:
        """Whether a Hello was accepted and the link still stands."""
        return self._multiplexer is not None

    @property
    def num_live(self) -> int:
        """Slots in use."""
        return self._multiplexer.num_live if self._multiplexer else 0

    @property
    def num_paused(self) -> int:
        """Of these, slots whose client is slow."""
        if self._paused:
            self._paused = {s for s in self._paused if s.link is self and s.paused_at is not None}
        return len(self._paused)

    @property
    def num_active(self) -> int:
        """Slots that need a place in the batch."""
        return self.num_live - self.num_paused

    def samples(self) -> list[LiveSample]:
        """The samples on this link."""
        return self._multiplexer.samples() if self._multiplexer else []

    def cancel(self, sample: LiveSample) -> None:
        """Ask for the end of a sample."""
        if self._multiplexer is not None:
            self._multiplexer.cancel(sample)

    def pause(self, sample: LiveSample) -> None:
        """Stop scheduling a sample."""
        if self._multiplexer is not None:
            self._multiplexer.pause(sample)
            self._paused.add(sample)
            self.on_pause()

    def resume(self, sample: LiveSample) -> None:
        """Schedule a sample again."""
        self._paused.discard(sample)
        if self._multiplexer is not None:
            self._multiplexer.resume(sample)

    def detach(self, sample: LiveSample) -> None:
        """Forget a sample and cancel its slot."""
        if self._multiplexer is not None:
            self._multiplexer.detach(sample)

    def on_pause(self) -> None:
        """A sample was paused."""
