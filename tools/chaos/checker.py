"""Holds what a client was sent against what an undisturbed engine draws. Pure: no gRPC calls, no clock.

One `StreamCheck` per request. It is told each delta, each finish and the end; `problems` says what was lost,
doubled or wrong, and `gaps_s` how long the client waited between tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LENGTH = "LENGTH"
STOP = "STOP"
# So far back, and ahead, a token that does not fit is looked for, to tell a loss from a repeat.
LOOK_AROUND = 64


@dataclass(frozen=True, slots=True)
class Expected:
    """The whole of one sample: its tokens, the name of its finish reason, and its text unless None."""

    token_ids: Sequence[int]
    reason: str = LENGTH
    text: str | None = None


@dataclass(slots=True)
class SampleCheck:
    """What came of one sample."""

    expected: Expected
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    reason: str | None = None
    last_at: float | None = None
    is_off: bool = False
    """Something did not fit: what follows mostly does not fit either, and is not told again."""


class StreamCheck:
    """What one client saw of one request. Times are in seconds of one monotonic clock. Without `has_tokens`
    the client is told text alone.
    """

    def __init__(self, name: str, expected: Sequence[Expected], *, has_tokens: bool = True) -> None:
        self.name = name
        self._has_tokens = has_tokens
        self.samples = [SampleCheck(one) for one in expected]
        self.gaps_s: list[float] = []
        self.worst_gap: tuple[float, float] = (0.0, 0.0)
        """The longest wait for a token, and when it was over."""
        self.num_lost = 0
        self.num_doubled = 0
        self.num_wrong = 0
        self.problems: list[str] = []
        self.error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that came."""
        return sum(len(sample.token_ids) for sample in self.samples)

    def on_delta(
        self,
        sample_index: int,
        token_ids: Sequence[int],
        now: float,
        *,
        text: str = "",
        counts_gap: bool = True,
    ) -> None:
        """New tokens of a sample. Without `counts_gap` the client itself was slow: the wait is nobody's."""
        sample = self._sample(sample_index)
        if sample is None:
            return
        if sample.reason is not None:
            self._problem("doubled", f"sample {sample_index}: a delta after its finish")
        if token_ids:
            self._on_wait(sample, now, counts_gap)
        for token_id in token_ids:
            self._check_token(sample_index, sample, token_id)
        if text:
            sample.pieces.append(text)

    def on_text(self, sample_index: int, text: str, now: float) -> None:
        """New text of a sample, for a client that is not told tokens. The expected text must be known."""
        sample = self._sample(sample_index)
        if sample is None or not text:
            return
        self._on_wait(sample, now, True)
        start = sum(map(len, sample.pieces))
        sample.pieces.append(text)
        whole = sample.expected.text or ""
        if not sample.is_off and not whole.startswith(text, start):
            sample.is_off = True
            self._problem("wrong", f"sample {sample_index}: text at {start} is {text[:20]!r}")

    def on_logprobs(self, sample_index: int, told: object, expected: object) -> None:
        """The log-probabilities that came with a token, and what they should have been."""
        if told != expected:
            self._problem("wrong", f"sample {sample_index}: logprobs {told!r} instead of {expected!r}")

    def on_finish(self, sample_index: int, reason: str, num_completion_tokens: int | None = None) -> None:
        """A sample's end; `reason` is the finish reason's name, without its prefix."""
        sample = self._sample(sample_index)
        if sample is None:
            return
        expected = sample.expected
        if sample.reason is not None:
            self._problem("doubled", f"sample {sample_index}: a second finish")
        sample.reason = reason
        if reason != expected.reason:
            self._problem("wrong", f"sample {sample_index}: ended with {reason}, not {expected.reason}")
            return
        missing = len(expected.token_ids) - len(sample.token_ids)
        if missing > 0 and self._has_tokens:
            self._problem("lost", f"sample {sample_index}: {missing} tokens missing at its end", missing)
        if num_completion_tokens not in (None, len(expected.token_ids)):
            self._problem("wrong", f"sample {sample_index}: usage says {num_completion_tokens} tokens")
        if expected.text is not None and not sample.is_off and "".join(sample.pieces) != expected.text:
            self._problem("wrong", f"sample {sample_index}: the text is not that of its tokens")

    def on_return(self, sample_index: int, num_tokens: int) -> None:
        """The client goes on after the first `num_tokens` tokens of a sample: what came after comes again,
        and so does its finish. The text is where it was.
        """
        sample = self.samples[sample_index]
        del sample.token_ids[num_tokens:]
        sample.reason = sample.last_at = None

    def on_error(self, error: str) -> None:
        """The stream ended with a status other than OK."""
        self.error = error

    def on_end(self, *, may_be_cut: bool = False) -> None:
        """Nothing more comes. `may_be_cut`: the client broke it off, so samples need not have ended."""
        if may_be_cut:
            return
        if self.error is not None:
            self.problems.append(f"{self.name}: ended with {self.error}")
        for index, sample in enumerate(self.samples):
            if sample.reason is None:
                missing = len(sample.expected.token_ids) - len(sample.token_ids)
                self._problem("lost", f"sample {index}: no finish came, {missing} tokens missing", missing)

    def _sample(self, index: int) -> SampleCheck | None:
        if index < len(self.samples):
            return self.samples[index]
        self._problem("wrong", f"sample {index} was never asked for")
        return None

    def _on_wait(self, sample: SampleCheck, now: float, counts_gap: bool) -> None:
        if counts_gap and sample.last_at is not None:
            gap_s = now - sample.last_at
            self.gaps_s.append(gap_s)
            self.worst_gap = max(self.worst_gap, (gap_s, now))
        sample.last_at = now

    def _check_token(self, index: int, sample: SampleCheck, token_id: int) -> None:
        position = len(sample.token_ids)
        expected = sample.expected.token_ids
        sample.token_ids.append(token_id)
        is_right = position < len(expected) and expected[position] == token_id
        if is_right or sample.is_off:
            return
        sample.is_off = True
        if token_id in expected[max(0, position - LOOK_AROUND) : position]:
            kind = "doubled"
        elif token_id in expected[position + 1 : position + 1 + LOOK_AROUND]:
            kind = "lost"
        else:
            kind = "wrong"
        self._problem(kind, f"sample {index}: token {position} is {token_id}")

    def _problem(self, kind: str, text: str, count: int = 1) -> None:
        self.problems.append(f"{self.name}: {kind}: {text}")
        if kind == "lost":
            self.num_lost += max(1, count)
        elif kind == "doubled":
            self.num_doubled += 1
        else:
            self.num_wrong += 1


def stopped_at(
    token_ids: Sequence[int], pieces: Sequence[bytes], stop: str, *, min_tokens: int = 0
) -> tuple[int, str] | None:
    """Where a stop string ends an output: the number of tokens through the one that completes it, and the
    text before it; None when it does not occur. `pieces` are the tokens' bytes.
    """
    wanted = stop.encode()
    text = b""
    for count, token_id in enumerate(token_ids, 1):
        searched = max(0, len(text) - len(wanted) + 1)
        text += pieces[token_id]
        at = text.find(wanted, searched)
        if at >= 0 and count > min_tokens:
            return count, text[:at].decode("utf-8", "replace")
    return None


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan
