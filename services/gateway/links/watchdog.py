"""Tells a dead engine, and a hung one, from a busy one. Pure: it is told the time and what was heard."""

from __future__ import annotations

from weft.v1 import engine_service_pb2 as engine_pb


class Watchdog:
    """Watches one link. Times are in seconds of one monotonic clock.

    Dead: slots are live and nothing came for `dead_s`. Hung: the heart beats, but its step runs longer than
    the engine's own bound for it and `hung_s` more. Neither is said of an engine while this process itself
    stood still: what it did not read then may lie there, unread.
    """

    def __init__(self, *, dead_s: float, hung_s: float) -> None:
        self._dead_s = dead_s
        self._hung_s = hung_s
        self._heard_at = 0.0
        self._looked_at: float | None = None
        self._beat: engine_pb.Heartbeat | None = None

    @property
    def heard_at(self) -> float:
        """When something came last."""
        return self._heard_at

    def start(self, now: float) -> None:
        """The first slot is live: an idle engine may be silent, so the clock starts here."""
        self._heard_at = now
        self._beat = None

    def hear(self, now: float) -> None:
        """Something came."""
        self._heard_at = now

    def beat(self, beat: engine_pb.Heartbeat) -> None:
        """A heartbeat came."""
        self._beat = beat

    def look(self, now: float, planned_s: float) -> None:
        """The watching task runs again, `planned_s` after it last did if this process is well. What is more
        than that is time that nobody was listening, and no engine's silence.
        """
        if self._looked_at is not None:
            stall_s = now - self._looked_at - planned_s
            if stall_s > self._dead_s / 10:
                # After a long stall the silence before it counts for nothing either.
                self._heard_at = now if stall_s > self._dead_s / 2 else min(now, self._heard_at + stall_s)
        self._looked_at = now

    def due_s(self, now: float) -> float:
        """Seconds until silence means death, if nothing comes."""
        return max(0.0, self._heard_at + self._dead_s - now)

    @property
    def has_beat(self) -> bool:
        """Whether a heartbeat has come since the start."""
        return self._beat is not None

    @property
    def is_hung(self) -> bool:
        """Whether the newest heartbeat told of a step that hangs."""
        beat = self._beat
        return beat is not None and beat.step_elapsed_ms > beat.step_bound_ms + self._hung_s * 1000

    def problem(self, now: float) -> str | None:
        """What is wrong with an engine that has live slots, or None."""
        if now - self._heard_at >= self._dead_s:
            return f"dead: nothing heard for {now - self._heard_at:.1f} s"
        beat = self._beat
        if beat is not None and self.is_hung:
            elapsed, bound = beat.step_elapsed_ms, beat.step_bound_ms
            return f"hung: step {beat.step} runs for {elapsed} ms, its bound is {bound}"
        return None
