"""Text, tokens and counts of one sample: the same however the tokens are cut into pieces."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.streams.sample_output import SampleOutput
from services.gateway.text.detokenizer import Vocabulary
from services.gateway.text.tokenization import Tokenizer

DEMO = Path(__file__).resolve().parents[4] / "models" / "demo" / "tokenizer.json"
TERMINAL = 1


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(Tokenizer(DEMO.read_bytes()))


def naive(ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, int, str | None]:
    """Decode every prefix from scratch; the first stop that ends in a token past min_tokens decides."""
    for count in range(min_tokens + 1, len(ids) + 1):
        before, after = vocabulary().decode(ids[: count - 1]), vocabulary().decode(ids[:count])
        settled = after.rstrip("�")
        for end in range(len(before.rstrip("�")) + 1, len(settled) + 1):
            matches = [stop for stop in stops if settled[:end].endswith(stop)]
            if matches:
                stop = max(matches, key=len)
                return settled[: end - len(stop)], count, stop
    return vocabulary().decode(ids), len(ids), None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from([*range(60, 120), 623, 226, 461, 300, 301]), max_size=25),
    st.lists(st.text(alphabet="abcdefgh ", min_size=1, max_size=3), max_size=4),
    st.integers(0, 6),
    st.sets(st.integers(0, 24)),
)
def test_same_as_decoding_everything(
    ids: list[int], stops: list[str], min_tokens: int, takes: set[int]
) -> None:
    output = SampleOutput(vocabulary(), stops=stops, min_tokens=min_tokens)
    text, given = "", []
    for index, token_id in enumerate(ids):
        output.push(token_id)
        if index in takes:
            more, new_ids = output.take()
            text += more
            given += new_ids
            assert output.num_bytes == len(text.encode())
    more, new_ids = output.finish()
    text += more
    given += new_ids
    expected, count, stop = naive(ids, stops, min_tokens)
    assert (text, output.num_tokens, output.stop) == (expected, count, stop)
    assert given == ids[:count]
    assert output.num_discarded == len(ids) - count


def test_a_terminal_token_has_no_text_and_counts() -> None:
    for stops in ([], ["zzz"]):
        output = SampleOutput(vocabulary(), stops=stops, terminal_ids=frozenset({461}))
        for token_id in (623, 461):
            output.push(token_id)
        assert output.finish() == (vocabulary().decode([623]), [623, 461])
        assert output.num_tokens == 2


def test_before_min_tokens_it_is_ordinary_text() -> None:
    for stops in ([], ["zzz"]):
        output = SampleOutput(vocabulary(), stops=stops, terminal_ids=frozenset({461}), min_tokens=2)
        for token_id in (623, 461):
            output.push(token_id)
        assert output.finish()[0] == vocabulary().decode([623, 461])
