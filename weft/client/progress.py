"""What a stream has given out, and how it goes on after an error. Knows messages, not how they travel."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import grpc

from weft.client.requests import Completion, Delta
from weft.rpc.errors import StatusError
from weft.v1 import gateway_service_pb2 as pb

# A busy or a lost server; before any output the same request may simply be sent again.
_RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})
_RESUMED = _RETRIED | {grpc.StatusCode.ABORTED}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often in a row a request is tried without a new token, and how long the waits are, in seconds. A
    time that the server names is kept instead.
    """

    max_attempts: int = 5
    first_wait_s: float = 0.1
    max_wait_s: float = 5.0

    def wait_s(self, num_failures: int) -> float:
        """Exponential, with jitter: between half of it and all."""
        wait: float = min(self.max_wait_s, self.first_wait_s * 2 ** (num_failures - 1))
        return wait * random.uniform(0.5, 1.0)


class Progress:
    """What a stream has given out, and how it goes on after an error. Pure but for the clock."""

    def __init__(self, request: pb.GenerateRequest, retry: RetryPolicy, timeout_s: float | None) -> None:
        self.completions = [Completion() for _ in range(max(1, request.sampling.n))]
        self.started: pb.Started | None = None
        self._request = request
        self._retry = retry
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._offsets = [0] * len(self.completions)
        # Tokens that were out when the offset was first reached, and how many will come a second time: a
        # resume by offset brings those again that had no text after it.
        self._counts = [0] * len(self.completions)
        self._doubles = [0] * len(self.completions)
        self._token = ""
        self._num_failures = 0

    @property
    def is_done(self) -> bool:
        """Whether every sample has ended."""
        return all(completion.finish is not None for completion in self.completions)

    def timeout_s(self) -> float | None:
        """The time that is left, or None."""
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def next_request(self) -> pb.GenerateRequest:
        """What to send now: the request, or the same from where it stopped."""
        pairs = zip(self.completions, self._counts, strict=True)
        self._doubles = [0 if self._token else len(c.token_ids) - count for c, count in pairs]
        if not self._token and not any(self._offsets):
            return self._request
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if self._token:
            request.ClearField("request_id")
            request.ClearField("resumable")
            request.resume_token = self._token
        elif len(self._offsets) == 1:
            request.resume_offset = self._offsets[0]
        else:
            request.resume_offsets.extend(self._offsets)
        return request

    def take(self, response: pb.GenerateResponse) -> Delta | None:
        """Take in an event; a Delta when there is new text or a new token."""
        kind = response.WhichOneof("event")
        if kind == "started":
            if self.started is None:
                self.started = response.started
        elif kind == "finish":
            self.completions[response.finish.sample_index].finish = response.finish
        elif kind == "delta":
            self._num_failures = 0
            new = response.delta
            index = new.sample_index
            completion = self.completions[index]
            known = min(self._doubles[index], len(new.token_ids))
            self._doubles[index] -= known
            token_ids = tuple(new.token_ids)[known:]
            if not token_ids and not new.text:
                return None
            self._token = ""  # it leads to a place that lies behind this
            completion.text += new.text
            completion.token_ids.extend(token_ids)
            if new.next_offset > self._offsets[index]:
                self._offsets[index], self._counts[index] = new.next_offset, len(completion.token_ids)
            return Delta(new.text, token_ids, index, new.next_offset, tuple(new.logprobs)[known:])
        return None

    def wait_after(self, error: StatusError) -> float:
        """Seconds until the next try. Raises the error when there is to be none."""
        self._num_failures += 1
        token = error.metadata.get("resume_token", "")
        if token:
            self._token = token
            can_go_on = error.code in _RESUMED
        elif self._request.resumable or self._token:
            can_go_on = error.code in _RETRIED
        else:
            # With output and no way to take it up, trying again would give it out twice.
            can_go_on = error.code in _RETRIED and not any(c.token_ids for c in self.completions)
        if self.is_done and error.reason:
            can_go_on = False  # the server's word, not a lost connection: the output is not all there is
        if not can_go_on or self._num_failures >= self._retry.max_attempts:
            raise error
        wait_s = error.retry_after_s or self._retry.wait_s(self._num_failures)
        if self._deadline is not None and time.monotonic() + wait_s >= self._deadline:
            raise error
        return wait_s
