"""What is asked: lengths, prefixes, seeds, traces with bad lines, files of prompts."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from cli.bench.files import read_texts, read_trace
from cli.bench.settings import Load, ServerSettings, Settings, SettingsError, WorkloadSettings
from cli.bench.vocabulary import TokenIds, Words, fitted
from cli.bench.workloads import Drawn, Texts, Trace, check_length, clip, conversation

IDS = TokenIds(tuple(range(300, 4000)))
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def drawn(kind: str, **fields: Any) -> tuple[Settings, Drawn]:
    workload = WorkloadSettings(kind=kind, **fields)
    settings = Settings(ServerSettings("here"), (Load(concurrency=1),), workload)
    return settings, Drawn(workload, IDS, settings.seed)


def test_fixed_lengths_are_exact_and_prompts_differ() -> None:
    settings, workload = drawn("fixed", input_tokens=(1000, 1000), output_tokens=(50, 50))
    made = [conversation(settings, workload, "p0", index).turns for index in range(20)]
    assert {(len(turns), len(turns[0].prompt), turns[0].max_tokens) for turns in made} == {(1, 1000, 50)}
    assert len({tuple(turns[0].prompt[:16]) for turns in made}) == 20


def test_random_lengths_fill_their_range() -> None:
    settings, workload = drawn("random", input_tokens=(5, 9), output_tokens=(2, 3))
    turns = [conversation(settings, workload, "p0", index).turns[0] for index in range(200)]
    assert {len(turn.prompt) for turn in turns} == {5, 6, 7, 8, 9}
    assert {turn.max_tokens for turn in turns} == {2, 3}


def test_a_seed_repeats_and_salts_and_numbers_differ() -> None:
    settings, workload = drawn("fixed")
    one = conversation(settings, workload, "p0", 5)
    assert conversation(settings, workload, "p0", 5) == one
    assert conversation(settings, workload, "p1", 5) != one
    assert conversation(settings, workload, "p0", 6) != one


def test_shared_prefixes_are_shared_and_only_they() -> None:
    settings, workload = drawn("shared-prefix", prefix_groups=3, prefix_tokens=40, input_tokens=(8, 8))
    prompts = [conversation(settings, workload, "p0", index).turns[0].prompt for index in range(60)]
    assert {len(prompt) for prompt in prompts} == {48}
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 3
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 60


def test_multi_turn_has_its_turns() -> None:
    settings, workload = drawn("multi-turn", turns=5, input_tokens=(8, 8))
    assert [len(turn.prompt) for turn in conversation(settings, workload, "p0", 0).turns] == [8] * 5


def test_fractions_are_met_and_cancel_within_the_answer() -> None:
    settings, workload = drawn("fixed", output_tokens=(10, 10))
    settings = Settings(
        settings.server, settings.loads, settings.workload, cancel_fraction=0.25, slow_fraction=0.1
    )
    turns = [conversation(settings, workload, "p0", index).turns[0] for index in range(2000)]
    cancels = [turn.cancel_after for turn in turns if turn.group == "cancelled"]
    assert len(cancels) == pytest.approx(500, abs=80)
    assert sum(turn.group == "slow" for turn in turns) == pytest.approx(200, abs=60)
    assert set(cancels) == set(range(1, 10))


def test_what_does_not_fit_the_context_is_refused() -> None:
    check_length(WorkloadSettings(input_tokens=(60, 60), output_tokens=(40, 40)), 100)
    with pytest.raises(SettingsError, match="needs 101 tokens"):
        check_length(WorkloadSettings(input_tokens=(1, 61), output_tokens=(40, 40)), 100)
    with pytest.raises(SettingsError, match="needs 200 tokens"):
        check_length(
            WorkloadSettings(kind="multi-turn", turns=2, input_tokens=(60, 60), output_tokens=(40, 40)), 199
        )


def test_words_are_fitted_to_what_the_server_counts() -> None:
    words = fitted((32, 50), (160, 242))
    assert (words.tokens_per_word, words.added_tokens) == (1.5, 2.0)
    assert len(str(words.draw(random.Random(1), 302)).split()) == 200
    assert fitted((32, 40), (160, 40)) == Words()


def test_a_trace_is_read_in_order_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        TRACE
        + "2023-11-16 18:15:50.9951690,396,109\n"
        + "2023-11-16 18:15:46.9951690,374,44\n"
        + "\n"
        + "2023-11-16 18:15:47.0\n"  # too few columns
        + "yesterday,1,2\n"
        + "2023-11-16 18:15:47.0,x,2\n"
        + "2023-11-16 18:15:47.0,0,2\n"
        + "2023-11-16 18:15:47.0,5,-1\n"
        + "2024-05-10 00:00:00.5+00:00,7,8\n"
    )
    rows, num_bad = read_trace(path, time_scale=0.5, limit=None)
    assert num_bad == 5
    assert [(row.context_tokens, row.generated_tokens) for row in rows] == [(374, 44), (396, 109), (7, 8)]
    assert [row.at_s for row in rows[:2]] == [0.0, pytest.approx(2.0)]
    limited, _ = read_trace(path, time_scale=1.0, limit=1)
    assert len(limited) == 1


@pytest.mark.parametrize("text", ["", "a,b,c\n1,2,3\n", TRACE, TRACE + "x,y,z\n"])
def test_what_is_no_trace_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_trace(path, time_scale=1.0, limit=None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="No such file"):
        read_trace(tmp_path / "none.csv", time_scale=1.0, limit=None)


def test_a_trace_is_clipped_to_the_context(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        TRACE + "2023-11-16 18:15:46,50,40\n2023-11-16 18:15:47,500,40\n2023-11-16 18:15:48,5,400\n"
    )
    rows, _ = read_trace(path, time_scale=1.0, limit=None)
    clipped, count = clip(rows, 100)
    assert count == 2
    assert [(row.context_tokens, row.generated_tokens) for row in clipped] == [(50, 40), (60, 40), (1, 99)]
    assert clip(rows, None) == (rows, 0)
    assert clip(rows, 100, is_exact=False)[0][1].context_tokens == 95 - 40
    workload = Trace(clipped, IDS, has_times=True)
    assert [workload.at_s(index) for index in range(3)] == [0.0, 1.0, 2.0]
    ((prompt, max_tokens),) = workload.turns(1, random.Random(1))
    assert (len(prompt), max_tokens) == (60, 40)


def test_the_azure_trace_is_read_whole(root: Path) -> None:
    path = root.parent / "shared" / "traces" / "azure_conv.csv"
    if not path.exists():
        pytest.skip("the trace is not here")
    rows, num_bad = read_trace(path, time_scale=1.0, limit=None)
    assert (len(rows), num_bad) == (19_366, 0)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(rows))


def test_prompts_of_every_form(tmp_path: Path) -> None:
    entries: list[Any] = [
        "plain",
        {"prompt": "p", "max_tokens": 9},
        {"text": "t"},
        {"conversations": [{"from": "system", "value": "no"}, {"from": "human", "value": "c"}]},
        {"messages": [{"role": "user", "content": "m"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "gpt", "value": "no question"}]},
        {"prompt": 7},
        17,
        "  ",
    ]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(map(json.dumps, entries)) + "\n{broken\n")
    whole = tmp_path / "prompts.json"
    whole.write_text(json.dumps(entries))
    plain = tmp_path / "prompts.txt"
    plain.write_text("eins\n\nzwei ü\n", encoding="utf-8")
    for path, num_bad in ((lines, 5), (whole, 4)):
        prompts, bad = read_texts(path)
        assert [(p.text, p.max_tokens) for p in prompts] == [
            ("plain", None),
            ("p", 9),
            ("t", None),
            ("c", None),
            ("m", None),
        ]
        assert bad == num_bad
    prompts, _ = read_texts(plain)
    assert [p.text for p in prompts] == ["eins", "zwei ü"]
    assert Texts(prompts, 5).turns(3, random.Random(1)) == [("zwei ü", 5)]


@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", b"\xff"), ("a.json", b"{"), ("a.json", b"{}"), ("a.txt", b"\n")]
)
def test_files_without_prompts_are_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        read_texts(path)
    assert "\n" not in str(caught.value)
