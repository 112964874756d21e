"""What the clients of a fault run ask for: requests drawn from a seed, and what each of them must get.

Pure: knows no connection, no engine, no time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from services.gateway.text.detokenizer import Vocabulary
from services.gateway.text.tokenization import Tokenizer
from tools.chaos.checker import STOP, Expected, stopped_at
from tools.mock_engine import oracle
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2

GENERATE, MULTIPLEX, HTTP = "generate", "multiplex", "http"
STEADY, CANCELS, SLOW, RETURNS = "steady", "cancels", "slow", "returns"
# Named in each request, so that no model's own defaults come into play.
TOP_P = 0.95


@dataclass(frozen=True, slots=True)
class Spec:
    """One request and how its client behaves. `stop` ends every sample that contains it. `cancel_after`: so
    many tokens a client waits for that cancels, or that loses its connection and comes back. `read_delay_s`:
    so long a slow one sleeps between messages, and one that comes back stays away.
    """

    name: str
    prompt_ids: tuple[int, ...]
    seed: int
    num_samples: int
    max_tokens: int
    temperature: float
    way: str = GENERATE
    behaviour: str = STEADY
    stop: str = ""
    logprobs: int | None = None
    cancel_after: int = 0
    read_delay_s: float = 0.0

    def request(self) -> pb.GenerateRequest:
        """The request as gRPC clients send it."""
        sampling = generation_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            seed=self.seed,
            temperature=self.temperature,
            top_p=TOP_P,
            top_k=0,
            n=self.num_samples,
            ignore_eos=True,
        )
        if self.logprobs is not None:
            sampling.logprobs = self.logprobs
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=self.prompt_ids),
            sampling=sampling,
            request_id=self.name,
            resumable=self.behaviour == RETURNS,
            stop=[self.stop] if self.stop else [],
        )

    def document(self) -> dict[str, object]:
        """The request as HTTP clients send it."""
        fields: dict[str, object] = {
            "prompt": list(self.prompt_ids),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": TOP_P,
            "top_k": 0,
            "n": self.num_samples,
            "ignore_eos": True,
            "stream": True,
        }
        if self.stop:
            fields["stop"] = self.stop
        return fields


Expect = Callable[[Spec], Sequence[Expected]]
"""What an undisturbed engine gives for a request, sample by sample."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are drawn from. Lengths in tokens, ends included; the rest are parts of one."""

    prompt_lengths: tuple[int, int] = (4, 160)
    output_lengths: tuple[int, int] = (20, 300)
    sample_counts: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 2, 3, 4)
    multiplex: float = 0.25
    http: float = 0.1
    cancels: float = 0.1
    slow: float = 0.08
    returns: float = 0.1
    stops: float = 0.15
    logprobs: float = 0.1
    greedy: float = 0.4
    prompt_ids: tuple[int, int] = (300, 3299)


class Workload:
    """The requests of one client after the other, the same for the same seed."""

    def __init__(self, seed: int, worker: int, mix: Mix, vocabulary: Vocabulary, expect: Expect) -> None:
        self._random = random.Random(f"{seed}/{worker}")
        self._worker = worker
        self._mix = mix
        self._vocabulary = vocabulary
        self._expect = expect
        self._num_made = 0
        # Every client begins many of its prompts like everybody's: prefixes are found and shared.
        common = random.Random(seed)
        self._head = [common.randint(*mix.prompt_ids) for _ in range(mix.prompt_lengths[1])]

    def next(self) -> tuple[Spec, list[Expected]]:
        """The next request, and what it must get."""
        spec = self.draw()
        return self.finish(spec, list(self._expect(spec)))

    def draw(self) -> Spec:
        """The next request, before a stop string is chosen from what it gets."""
        draw, mix = self._random, self._mix
        self._num_made += 1
        shared = draw.randint(0, mix.prompt_lengths[1]) if draw.random() < 0.4 else 0
        own = [draw.randint(*mix.prompt_ids) for _ in range(draw.randint(*mix.prompt_lengths))]
        prompt = (self._head[:shared] + own)[: mix.prompt_lengths[1]]
        kinds = {CANCELS: mix.cancels, SLOW: mix.slow, RETURNS: mix.returns}
        behaviour = _one_of(draw, kinds, STEADY)
        way = _one_of(draw, {MULTIPLEX: mix.multiplex, HTTP: mix.http}, GENERATE)
        if behaviour in (SLOW, RETURNS):
            way = GENERATE  # a slow one on a connection of its own, where it holds nobody else up
        max_tokens = draw.randint(*mix.output_lengths)
        return Spec(
            name=f"c{self._worker}-{self._num_made}",
            prompt_ids=tuple(prompt),
            seed=draw.getrandbits(53),
            num_samples=draw.choice(mix.sample_counts),
            max_tokens=max_tokens,
            temperature=0.0 if draw.random() < mix.greedy else 0.8,
            way=way,
            behaviour=behaviour,
            logprobs=draw.randint(0, 3) if way != HTTP and draw.random() < mix.logprobs else None,
            cancel_after=draw.randint(0, max_tokens),
            read_delay_s=draw.uniform(0.005, 0.03),
        )

    def finish(self, spec: Spec, expected: list[Expected]) -> tuple[Spec, list[Expected]]:
        """The request as it is, or with a stop string that its first sample meets; others may."""
        draw = self._random
        if draw.random() >= self._mix.stops:
            return spec, expected
        tokens = expected[0].token_ids
        start = draw.randrange(len(tokens))
        stop = self._vocabulary.decode(tokens[start:][:3]).replace("\ufffd", "")[:12]
        if not stop.strip():
            return spec, expected
        return replace(spec, stop=stop), [stop_early(one, stop, self._vocabulary) for one in expected]


class Repeated:
    """Requests whose outputs are known, again and again, each time under another name."""

    def __init__(self, known: Sequence[tuple[Spec, list[Expected]]]) -> None:
        self._known = known
        self._num_made = 0

    def next(self) -> tuple[Spec, list[Expected]]:
        """As of `Workload`."""
        spec, expected = self._known[self._num_made % len(self._known)]
        self._num_made += 1
        return replace(spec, name=f"{spec.name}-{self._num_made}"), expected


def _one_of(draw: random.Random, parts: dict[str, float], other: str) -> str:
    """One of the names, each with its part of one; `other` has the rest."""
    point = draw.random()
    for name, part in parts.items():
        point -= part
        if point < 0:
            return name
    return other


def stop_early(expected: Expected, stop: str, vocabulary: Vocabulary) -> Expected:
    """A sample as a stop string leaves it."""
    found = stopped_at(expected.token_ids, vocabulary.visible_pieces, stop)
    if found is None:
        return expected
    count, text = found
    return Expected(expected.token_ids[:count], STOP, text)


def mock_expect(vocabulary: Vocabulary) -> Expect:
    """What mock engines draw."""

    def expect(spec: Spec) -> list[Expected]:
        found = []
        for index in range(spec.num_samples):
            tokens = oracle.expected_tokens(spec.prompt_ids, spec.seed, index, spec.max_tokens)
            found.append(Expected(tokens, text=vocabulary.decode(tokens)))
        return found

    return expect


def load_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a model directory's tokenizer.json, as the gateway reads it."""
    return Vocabulary(Tokenizer((directory / "tokenizer.json").read_bytes()))
