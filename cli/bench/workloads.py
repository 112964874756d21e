"""What is asked: conversations of one or more turns, each a pure function of the seed and its number.

Being so, they are the same in every run of a seed, and several processes can each make their own share.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from cli.bench.files import TextPrompt, TraceRow
from cli.bench.records import MEASURED, SLOW, TO_CANCEL
from cli.bench.settings import Settings, SettingsError, WorkloadSettings
from cli.bench.vocabulary import Prompt, Vocabulary

WORDS_SHARE = 0.95
"""Of the context, for prompts of words: so many tokens more or less are luck."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request to be."""

    prompt: Prompt
    max_tokens: int
    group: str = MEASURED
    cancel_after: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Requests that follow each other. `at_s` is when it begins, where the workload says so."""

    index: int
    turns: tuple[Turn, ...]
    at_s: float | None = None


class Workload(Protocol):
    """Makes conversations."""

    @property
    def size(self) -> int | None:
        """How many there are, or None: as many as wanted."""

    def turns(self, index: int, rng: random.Random) -> list[tuple[Prompt, int]]:
        """Prompts of one conversation, each with the most tokens to answer."""

    def at_s(self, index: int) -> float | None:
        """When it begins, in seconds from the start, if the workload knows."""


@dataclass(frozen=True)
class Drawn:
    """fixed, random, shared-prefix and multi-turn: prompts are drawn."""

    settings: WorkloadSettings
    vocabulary: Vocabulary
    seed: object
    size: int | None = None

    def turns(self, index: int, rng: random.Random) -> list[tuple[Prompt, int]]:
        """One turn, or as many as the settings say."""
        settings = self.settings
        count = settings.turns if settings.kind == "multi-turn" else 1
        found = []
        for _ in range(count):
            prompt = self.vocabulary.draw(rng, rng.randint(*settings.input_tokens))
            if settings.kind == "shared-prefix":
                group = rng.randrange(settings.prefix_groups)
                prefix = self.vocabulary.draw(
                    random.Random(f"prefix {self.seed} {group}"), settings.prefix_tokens
                )
                prompt = self.vocabulary.join(prefix, prompt)
            found.append((prompt, rng.randint(*settings.output_tokens)))
        return found

    def at_s(self, index: int) -> float | None:
        """The load says."""
        return None


@dataclass(frozen=True)
class Trace:
    """Lengths and times as they were recorded somewhere; the words are drawn."""

    rows: tuple[TraceRow, ...]
    vocabulary: Vocabulary
    has_times: bool

    @property
    def size(self) -> int | None:
        """One for each row."""
        return len(self.rows)

    def turns(self, index: int, rng: random.Random) -> list[tuple[Prompt, int]]:
        """The row's lengths."""
        row = self.rows[index]
        return [(self.vocabulary.draw(rng, row.context_tokens), row.generated_tokens)]

    def at_s(self, index: int) -> float | None:
        """The row's time, unless the load has its own."""
        return self.rows[index].at_s if self.has_times else None


@dataclass(frozen=True)
class Texts:
    """Prompts out of a file, in the file's order, again from its beginning when they are used up."""

    prompts: tuple[TextPrompt, ...]
    max_tokens: int
    size: int | None = None

    def turns(self, index: int, rng: random.Random) -> list[tuple[Prompt, int]]:
        """One prompt."""
        prompt = self.prompts[index % len(self.prompts)]
        return [(prompt.text, prompt.max_tokens or self.max_tokens)]

    def at_s(self, index: int) -> float | None:
        """The load says."""
        return None


def conversation(settings: Settings, workload: Workload, salt: object, index: int) -> Conversation:
    """The conversation of one number; which of its turns are cancelled or read slowly is drawn with it."""
    rng = random.Random(f"{settings.seed} {salt} {index}")
    turns = []
    for prompt, max_tokens in workload.turns(index, rng):
        chance = rng.random()
        cancel_after = None
        group = MEASURED
        # A token alone cannot be cancelled half way.
        if chance < settings.cancel_fraction and max_tokens > 1:
            group, cancel_after = TO_CANCEL, rng.randint(1, max_tokens - 1)
        elif settings.cancel_fraction <= chance < settings.cancel_fraction + settings.slow_fraction:
            group = SLOW
        turns.append(Turn(prompt, max_tokens, group, cancel_after))
    return Conversation(index, tuple(turns), workload.at_s(index))


def longest(settings: WorkloadSettings) -> int:
    """Most tokens of a drawn conversation, prompts and answers together."""
    one = settings.input_tokens[1] + settings.output_tokens[1]
    if settings.kind == "multi-turn":
        return one * settings.turns
    return one + (settings.prefix_tokens if settings.kind == "shared-prefix" else 0)


def clip(
    rows: tuple[TraceRow, ...], max_model_len: int | None, *, is_exact: bool = True
) -> tuple[tuple[TraceRow, ...], int]:
    """Shorten prompts, and answers that alone are too long, to the model's context; and how many it were.
    Prompts whose lengths are not exact leave some of it free.
    """
    if max_model_len is None:
        return rows, 0
    if not is_exact:
        max_model_len = max(2, int(max_model_len * WORDS_SHARE))
    found, num_clipped = [], 0
    for row in rows:
        generated = min(row.generated_tokens, max_model_len - 1)
        context = min(row.context_tokens, max_model_len - generated)
        changed = (generated, context) != (row.generated_tokens, row.context_tokens)
        num_clipped += changed
        found.append(TraceRow(row.at_s, context, generated) if changed else row)
    return tuple(found), num_clipped


def check_length(settings: WorkloadSettings, max_model_len: int | None) -> None:
    """Refuse drawn lengths that the model has no room for. Raises SettingsError."""
    if settings.kind in ("trace", "text") or max_model_len is None:
        return
    most = longest(settings)
    if most > max_model_len:
        raise SettingsError(
            f"this workload needs {most} tokens of context, the model has {max_model_len}: "
            "give smaller --input-tokens or --output-tokens"
        )
