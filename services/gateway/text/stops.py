"""Stop strings in a growing text.

The match that ends first wins, whatever the tokens or frames the text came in; of several that end at one
character the longest wins. Text that could still become a match is held back, no more and no less. An
Aho-Corasick automaton makes the cost linear in the text. Knows nothing of tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class Pushed(NamedTuple):
    """What one piece of text led to: text that may go out, and the stop string that was met, if one was."""

    text: str
    stop: str | None


class StopMatcher:
    """Looks for `stops` (none empty) in text that is pushed piece by piece. After a match it must not be
    used.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._goto: list[dict[str, int]] = [{}]
        self._depth: list[int] = [0]
        self._match: list[str | None] = [None]
        for stop in dict.fromkeys(stops):
            self._insert(stop)
        self._fail = self._link()
        self._firsts = frozenset(self._goto[0])
        self._state = 0
        self._held = ""

    def push(self, text: str, *, is_armed: bool = True) -> Pushed:
        """Take `text`. While not `is_armed`, a match that completes in it is passed over."""
        if self._state == 0 and self._firsts.isdisjoint(text):
            return Pushed(text, None)
        goto, fail, state = self._goto, self._fail, self._state
        for index, character in enumerate(text):
            while state and character not in goto[state]:
                state = fail[state]
            state = goto[state].get(character, 0)
            stop = self._match[state]
            if stop is not None and is_armed:
                whole = self._held + text[: index + 1]
                self._state, self._held = 0, ""
                return Pushed(whole[: len(whole) - len(stop)], stop)
        # A state without children is a whole stop string that was passed over; only its tail can begin
        # another.
        while state and not goto[state]:
            state = fail[state]
        self._state = state
        whole = self._held + text
        cut = len(whole) - self._depth[state]
        self._held = whole[cut:]
        return Pushed(whole[:cut], None)

    def finish(self) -> str:
        """The text held back, once no more will come."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _insert(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string is empty")
        state = 0
        for character in stop:
            following = self._goto[state].get(character)
            if following is None:
                following = len(self._goto)
                self._goto[state][character] = following
                self._goto.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = following
        self._match[state] = stop

    def _link(self) -> list[int]:
        """fail[s]: the state of the longest proper suffix of s. Breadth first, so shorter states are done."""
        fail = [0] * len(self._goto)
        pending = deque(self._goto[0].values())
        while pending:
            state = pending.popleft()
            for character, child in self._goto[state].items():
                fallback = fail[state]
                while fallback and character not in self._goto[fallback]:
                    fallback = fail[fallback]
                fail[child] = self._goto[fallback].get(character, 0)
                pending.append(child)
            if (
                self._match[state] is None
            ):  # the longest match at a state is its own string, else its suffix's
                self._match[state] = self._match[fail[state]]
        return fail
