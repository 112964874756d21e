"""Versions of a model: names, weights, and which request gets which."""

from __future__ import annotations

from collections import Counter

import pytest

from services.gateway.config import load
from services.gateway.routing.versions import (
    Variant,
    VersionWeight,
    choose,
    parse_version_weights,
    shares,
    split_name,
)

V1, V2, V3 = (Variant("demo", f"v{n}", f"sha256:{n}", capacity=64) for n in (1, 2, 3))


def drawn(
    variants: list[Variant], weights: dict[str, float], num_keys: int = 4000
) -> dict[str, Variant | None]:
    return {f"key-{n}": choose(variants, weights, f"key-{n}") for n in range(num_keys)}


def test_weights_are_parsed() -> None:
    assert parse_version_weights("demo@v2=5%, other@2026-11=12.5%") == (
        VersionWeight("demo", "v2", 0.05),
        VersionWeight("other", "2026-11", 0.125),
    )
    assert str(VersionWeight("demo", "v2", 0.05)) == "demo@v2=5%"


@pytest.mark.parametrize(
    "text",
    [
        "demo=5%",
        "demo@v2",
        "demo@v2=5",
        "demo@v2=-1%",
        "demo@v2=101%",
        "demo@v2=nan%",
        "@v2=5%",
        "demo@=5%",
        "demo@v2=5%,demo@v2=6%",
        "demo@v1=60%,demo@v2=41%",
    ],
)
def test_bad_weights_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_version_weights(text)


def test_the_flag_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["--tokenizer", "x", "--version-weight", "demo@v2=5%", "--version-weight=demo@v3=1%"])
    assert [str(weight) for weight in config.version_weight] == ["demo@v2=5%", "demo@v3=1%"]
    with pytest.raises(SystemExit):
        load(["--tokenizer", "x", "--version-weight", "demo@v2=500%"])
    assert "--version-weight" in capsys.readouterr().err


def test_a_name_is_a_model_or_a_model_and_a_version() -> None:
    assert split_name("demo", ["demo"]) == ("demo", None)
    assert split_name("demo@v2", ["demo"]) == ("demo", "v2")
    assert split_name("a@b", ["a@b"]) == ("a@b", None), "a model whose own name has an @"
    assert split_name("a@b@v1", ["a@b"]) == ("a@b", "v1")
    assert split_name("unknown", ["demo"]) == ("unknown", None)


def test_a_weight_is_the_share_of_requests() -> None:
    counts = Counter(variant and variant.version for variant in drawn([V1, V2], {"v2": 0.05}).values())
    assert 0.035 < counts["v2"] / 4000 < 0.065
    assert counts["v1"] + counts["v2"] == 4000


def test_versions_without_a_weight_share_the_rest_by_what_their_engines_run() -> None:
    large = V3._replace(capacity=192)
    assert shares([V1, V2, large], {"v2": 0.2}) == pytest.approx([0.2, 0.2, 0.6])
    counts = Counter(variant and variant.version for variant in drawn([V1, V2, large], {"v2": 0.2}).values())
    assert 0.55 < counts["v3"] / 4000 < 0.65


def test_a_weight_of_nothing_is_only_had_by_name() -> None:
    assert choose([V2], {"v2": 0.0}, "key") is None
    assert choose([V1, V2], {"v2": 0.0}, "key") == V1
    assert choose([V3], {"v1": 1.0}, "key") is None
    assert choose([], {}, "key") is None


def test_a_version_that_is_away_leaves_its_share_to_the_others() -> None:
    assert set(drawn([V1], {"v2": 0.95}).values()) == {V1}


def test_the_same_key_gets_the_same_version_and_few_move_with_the_weights() -> None:
    before = drawn([V1, V2], {"v2": 0.05})
    assert before == drawn([V2, V1], {"v2": 0.05}), "whatever the order"
    after = drawn([V1, V2], {"v2": 0.10})
    moved = [key for key in before if before[key] != after[key]]
    assert 0.03 < len(moved) / 4000 < 0.07
    assert all(after[key] == V2 for key in moved), "only towards what got more"
