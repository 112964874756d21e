"""What a user does against the published ports. Knows the public protocols, and nothing of docker."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from weft.client import Client, RetryPolicy, StatusError


@dataclass
class StreamResult:
    """One stream as its client saw it."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    gap_s: float = 0.0
    error: str = ""


def check_reachable(port: int) -> None:
    """AssertionError with what to do when a published port does not answer from here."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError as error:
        raise AssertionError(
            f"127.0.0.1:{port} is published, and not to be reached from here ({error}): where the engine has "
            "a network namespace of its own, run pytest in it"
        ) from error


class Streams:
    """Streams side by side, half of them greedy and half of them seeded, each in a thread."""

    def __init__(
        self, port: int, count: int, max_tokens: int, prompt: str = "Once upon a time, number"
    ) -> None:
        self.results = [StreamResult() for _ in range(count)]
        # One attempt: what is recovered here is recovered by the gateway, not by the client.
        self._client = Client(f"127.0.0.1:{port}", retry=RetryPolicy(max_attempts=1))
        self._max_tokens = max_tokens
        self._prompt = prompt
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def wait_for_tokens(self, count: int, seconds: float) -> None:
        """Until every stream has as many."""
        end = time.monotonic() + seconds
        while any(len(r.token_ids) < count and not r.error for r in self.results):
            assert time.monotonic() < end, f"no {count} tokens in {seconds:g} s: {self.results}"
            time.sleep(0.05)

    def join(self, seconds: float) -> list[StreamResult]:
        """Until all have ended."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), f"streams still open: {self.results}"
        self._client.close()
        return self.results

    def _run(self, index: int) -> None:
        result = self.results[index]
        sampling: dict[str, Any] = (
            {"temperature": 0.0} if index % 2 == 0 else {"temperature": 0.9, "seed": index}
        )
        try:
            with self._client.generate(
                f"{self._prompt} {index}", max_tokens=self._max_tokens, ignore_eos=True, **sampling
            ) as stream:
                last = 0.0
                for delta in stream:
                    now = time.monotonic()
                    result.gap_s = max(result.gap_s, now - last) if last else 0.0
                    last = now
                    result.token_ids.extend(delta.token_ids)
                    result.text += delta.text
        except StatusError as error:
            result.error = str(error)


def http_json(port: int, path: str) -> Any:
    """GET, as JSON."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
        return json.loads(response.read() or b"null")


def http_stream(port: int, body: dict[str, Any]) -> list[dict[str, Any]]:
    """POST /v1/completions with stream: the events, [DONE] checked and left out."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps({**body, "stream": True}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.decode().strip() for line in response]
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]
