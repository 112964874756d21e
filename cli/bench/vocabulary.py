"""Prompts of a wanted length: out of token ids where the server takes them, else out of words. Pure.

A prompt is a random draw, so no two begin alike and a prefix cache finds nothing that was not meant for it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

Prompt = str | list[int]

# Short common words: in most tokenizers one token each, with the space before it.
_WORDS = """
    about above across after again against along also always among another around because become before
    began behind being below better between beyond body both bring brought brother build called came
    cannot carry cause certain change child church city clear close cold come common could country course
    cover dark daughter day dead dear death deep did different door down draw during each early earth east
    else end enough even evening ever every eyes face fact fair fall family far father fear feel feet few
    field fight find fine fire first five follow food foot force form found four free friend from full
    gave general girl give given gold gone good great green ground grow half hand happy hard have head
    hear heard heart held help here high him himself home hope horse hour house how hundred idea indeed
    into itself just keep kind king knew know lady land large last late laugh law lay learn least leave
    left less letter life light like line little live long look lord lost love low made make man many mark
    matter may mean men might mind moment money moon more morning most mother mouth move much must name
    nature near never new next night no none north not nothing now number of off often old once one only
    open order other our out over own paper part pass past people perhaps person place plain play point
    poor power present put quite rather read ready real reason red rest return rich right river road room
    round said same saw say sea second see seem seen self send sense set seven several shall she ship
    short should show side sight since six sleep small so some son soon sound south speak spirit stand
    star state stay step still stood stone story street strong such summer sun sure sweet take talk tell
    ten than that their them then there these they thing think third this those though thought three
    through time to together told too took toward town tree true truth turn two under until up upon use
    very voice wait walk wall want war was watch water way we week well went were west what when where
    which while white who whole whose why wife wild will wind window winter wish with without woman wonder
    wood word work world would write wrong year yes yet you young your
"""
WORDS = tuple(_WORDS.split())


class Vocabulary(Protocol):
    """What prompts are made of. Can be sent to another process."""

    @property
    def is_exact(self) -> bool:
        """Whether a prompt has just the number of tokens that was asked for."""

    def draw(self, rng: random.Random, num_tokens: int) -> Prompt:
        """A prompt of so many tokens."""

    def join(self, first: Prompt, second: Prompt) -> Prompt:
        """One prompt behind another."""


@dataclass(frozen=True)
class TokenIds:
    """Prompts as token ids out of a pool: lengths are exact."""

    pool: tuple[int, ...]
    is_exact: bool = True

    def draw(self, rng: random.Random, num_tokens: int) -> Prompt:
        """So many ids."""
        return rng.choices(self.pool, k=num_tokens)

    def join(self, first: Prompt, second: Prompt) -> Prompt:
        """All ids."""
        return [*first, *second]


@dataclass(frozen=True)
class Words:
    """Prompts as text. A server has said how many tokens a word takes on average, and how many it adds."""

    tokens_per_word: float = 1.0
    added_tokens: float = 0.0
    is_exact: bool = False

    def draw(self, rng: random.Random, num_tokens: int) -> Prompt:
        """About so many tokens; at least one word."""
        num_words = max(1, round((num_tokens - self.added_tokens) / self.tokens_per_word))
        return " ".join(rng.choices(WORDS, k=num_words))

    def join(self, first: Prompt, second: Prompt) -> Prompt:
        """With a space between."""
        return f"{first} {second}"


def fitted(few: tuple[int, int], many: tuple[int, int]) -> Words:
    """From two prompts of (words, tokens as the server counted them)."""
    per_word = (many[1] - few[1]) / (many[0] - few[0])
    if per_word <= 0:
        return Words()
    return Words(per_word, few[1] - few[0] * per_word)
