"""From records to numbers: latencies, rates, goodput, and where every request went. Pure.

TTFT counts from when the request should have been sent to its first token; end-to-end to its last byte. ITL
has one value for each token but the first: the gap before a message of k tokens counts as k gaps of a k-th,
and the tokens that came along with the first one as gaps of 0. The message gaps themselves are beside it: a
stall that ends in a message of many tokens shows there in full. TPOT is the mean over a request, the first
token left out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cli.bench.percentiles import distribution, percentile
from cli.bench.records import GROUPS, MEASURED, OK, OUTCOMES, Record
from cli.bench.settings import Target

MS = 1e3


def ttft_s(record: Record) -> float | None:
    """From the scheduled time to the first message with a token."""
    return record.times[0] - record.scheduled if record.times else None


def e2e_s(record: Record) -> float | None:
    """From the scheduled time to the end of the answer; of whole answers."""
    return record.end - record.scheduled if record.outcome == OK else None


def tpot_s(record: Record) -> float | None:
    """Mean gap between tokens. None where the server has not said how many there were, or only one."""
    total = record.num_tokens
    if record.outcome != OK or not record.times or total is None or total < 2:
        return None
    return (record.times[-1] - record.times[0]) / (total - 1)


def message_gaps_s(record: Record) -> list[float]:
    """Between messages that held tokens."""
    times = record.times
    return [later - sooner for sooner, later in itertools.pairwise(times)]


def itl_s(record: Record) -> list[float]:
    """Between tokens. A message that does not say how many it holds counts as one."""
    if not record.times:
        return []
    gaps = [0.0] * (max(1, record.counts[0]) - 1)
    for gap, count in zip(message_gaps_s(record), record.counts[1:], strict=True):
        gaps += [gap / count] * count if count > 1 else [gap]
    return gaps


def is_good(record: Record, targets: Iterable[Target]) -> bool:
    """Whether an answer came whole and meets every target. An ITL target is met when 99 % of the request's
    message gaps are within it. What a request does not have, as the TPOT of a single token, it meets. Where
    nobody says how many tokens there were, each message counts as one: TPOT is then at most that.
    """
    if record.outcome != OK:
        return False
    for target in targets:
        value: float | None
        if target.metric == "itl":
            gaps = sorted(message_gaps_s(record))
            value = percentile(gaps, 99) if gaps else None
        else:
            value = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}[target.metric](record)
            if target.metric == "tpot" and record.num_tokens is None and len(record.times) > 1:
                value = (record.times[-1] - record.times[0]) / (len(record.times) - 1)
        if value is not None and value * MS > target.limit_ms:
            return False
    return True


def latencies(records: Sequence[Record], *, only_whole: bool = True) -> dict[str, Any]:
    """Distributions in milliseconds. Of answers that came whole; the counts tell of how many. With
    `only_whole` unset, first tokens and gaps of the others are in it, too.
    """
    whole = [record for record in records if record.outcome == OK or not only_whole]
    return {
        "ttft": distribution((v for r in whole if (v := ttft_s(r)) is not None), MS),
        "itl": distribution((gap for r in whole for gap in itl_s(r)), MS),
        "message_gap": distribution((gap for r in whole for gap in message_gaps_s(r)), MS),
        "tpot": distribution((v for r in whole if (v := tpot_s(r)) is not None), MS),
        "e2e": distribution((v for r in whole if (v := e2e_s(r)) is not None), MS),
    }


def accounting(records: Sequence[Record], num_unsent: int) -> dict[str, Any]:
    """Where every request went. `sent` is the sum of the outcomes, and of the groups' sums."""
    outcomes = Counter(record.outcome for record in records)
    groups = {}
    for group in GROUPS:
        found = Counter(record.outcome for record in records if record.group == group)
        groups[group] = {"sent": sum(found.values()), **{name: found[name] for name in OUTCOMES}}
    return {
        "sent": len(records),
        **{name: outcomes[name] for name in OUTCOMES},
        "unsent": num_unsent,
        "finish_reasons": dict(sorted(Counter(r.finish for r in records if r.outcome == OK).items())),
        "groups": groups,
    }


def errors(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Failures by status and reason, the most frequent first."""
    found = Counter((r.status, r.reason) for r in records if r.outcome == "failed")
    ordered = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    return [{"status": status, "reason": reason, "count": count} for (status, reason), count in ordered]


def tokens_in_window(records: Iterable[Record], start: float, end: float) -> tuple[float, int]:
    """Output tokens that arrived in a window, and of how many requests the server has not said their number.

    Where only the sum is known, as over HTTP, each message of the request counts as an equal part of it.
    """
    total, num_unknown = 0.0, 0
    for record in records:
        if not record.times:
            continue
        whole = record.num_tokens
        if record.has_counts:
            weights: Iterable[float] = record.counts
        elif whole is not None:
            weights = [whole / len(record.times)] * len(record.times)
        else:
            num_unknown += 1
            continue
        arrived = zip(record.times, weights, strict=True)
        total += sum(weight for at, weight in arrived if start <= at <= end)
    return total, num_unknown


def concurrency(records: Iterable[Record], start: float, end: float) -> dict[str, float]:
    """Requests in flight: the peak, and the mean over the window."""
    changes = sorted(
        [(record.sent, 1) for record in records] + [(record.end, -1) for record in records],
        key=lambda change: (change[0], change[1]),
    )
    running = peak = 0
    area, last = 0.0, start
    for at, change in changes:
        inside = min(max(at, start), end)
        area += running * (inside - last)
        last = inside
        running += change
        peak = max(peak, running)
    return {"peak": peak, "mean": area / (end - start) if end > start else 0.0}


def rates(
    records: Sequence[Record], start: float, end: float, targets: Sequence[Target]
) -> dict[str, float | int | None]:
    """Per second of the window. Tokens and requests of all groups: they all were the server's work; goodput
    is of the measured group alone.
    """
    window = max(end - start, 1e-9)
    output, num_unknown = tokens_in_window(records, start, end)
    done = [r for r in records if r.outcome == OK and start <= r.end <= end]
    begun = [r for r in records if r.times and start <= r.times[0] <= end]
    inputs = [r.prompt_tokens for r in begun if r.prompt_tokens is not None]
    # A server that never says how many tokens it wrote has no rate of tokens.
    is_known = not (num_unknown and not output)
    per_s = output / window if is_known else None
    input_per_s = sum(inputs) / window if inputs or not begun else None
    found: dict[str, float | int | None] = {
        "requests_per_s": len(done) / window,
        "output_tokens_per_s": per_s,
        "input_tokens_per_s": input_per_s,
        "total_tokens_per_s": per_s + input_per_s if per_s is not None and input_per_s is not None else None,
        "requests_without_token_count": num_unknown,
        "goodput_requests_per_s": None,
        "good_share": None,
    }
    if targets:
        measured = [r for r in records if r.group == MEASURED and r.outcome != "interrupted"]
        good = [r for r in measured if is_good(r, targets)]
        found["goodput_requests_per_s"] = sum(start <= r.end <= end for r in good) / window
        found["good_share"] = len(good) / len(measured) if measured else None
    return found


def token_counts(records: Sequence[Record]) -> dict[str, Any]:
    """Lengths, as the server's usage tells them, beside what was asked for."""
    whole = [r for r in records if r.outcome == OK]
    inputs = [r.prompt_tokens for r in whole if r.prompt_tokens is not None]
    outputs = [r.completion_tokens for r in whole if r.completion_tokens is not None]
    cached = [r.cached_tokens for r in whole if r.cached_tokens is not None]
    with_tokens = [r for r in whole if r.times and r.completion_tokens]
    num_messages = sum(len(r.times) for r in with_tokens)
    short = [r for r in whole if r.completion_tokens is not None and r.completion_tokens < r.asked_tokens]
    return {
        "input": distribution(inputs) | {"sum": sum(inputs)},
        "output": distribution(outputs) | {"sum": sum(outputs)},
        "cached_share": sum(cached) / sum(inputs) if cached and sum(inputs) else None,
        "shorter_than_asked": len(short),
        "per_message": sum(r.completion_tokens or 0 for r in with_tokens) / num_messages
        if num_messages
        else None,
        "itl_counts_tokens": all(r.has_counts for r in whole),
    }
