"""From text to windows of token ids."""

import json
from pathlib import Path

import pytest
import torch

from services.quantizer.calibration import calibration_windows, evaluation_windows, load_tokenizer
from services.quantizer.errors import QuantizerError

DEMO = Path(__file__).parents[3] / "models" / "demo"
TEXTS = [" ".join(f"{noun} {number}" for number in range(n)) for noun, n in (("word", 300), ("stone", 500))]


def test_settings_that_a_tokenizer_file_carries_do_not_cut_the_text(tmp_path):
    document = json.loads((DEMO / "tokenizer.json").read_text())
    document["truncation"] = {
        "direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    document["padding"] = {
        "strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    changed, plain = (
        calibration_windows(load_tokenizer(directory), TEXTS, 1000, 64, 0, 4096)
        for directory in (tmp_path, DEMO)
    )
    assert torch.equal(changed, plain)
    assert len(plain) > 10


def test_windows_are_chosen_by_the_seed_and_kept_in_order():
    tokenizer = load_tokenizer(DEMO)
    every = calibration_windows(tokenizer, TEXTS, 1000, 64, 0, 4096)
    assert every.shape[1] == 64
    first, again, other = (calibration_windows(tokenizer, TEXTS, 5, 64, seed, 4096) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    places = [int((every == window).all(1).nonzero()[0]) for window in first]
    assert places == sorted(set(places))


@pytest.mark.parametrize(
    ("num_tokens", "shape"), [(256, (4, 64)), (300, (4, 64)), (100, (2, 50)), (1000, (14, 64))]
)
def test_evaluation_takes_equal_shares_and_no_more_than_asked(num_tokens, shape):
    found = evaluation_windows(load_tokenizer(DEMO), TEXTS, num_tokens, 64, 4096)
    assert tuple(found.shape) == shape
    assert found.numel() <= num_tokens


def test_ids_that_the_model_does_not_know_are_refused():
    with pytest.raises(QuantizerError, match="the model knows 10 tokens"):
        calibration_windows(load_tokenizer(DEMO), TEXTS, 5, 64, 0, 10)
