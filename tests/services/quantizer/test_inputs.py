"""What a run reads: files, weights and budgets as a user gives them, and what is told of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from services.quantizer.calibration import load_tokenizer, windows
from services.quantizer.config import QuantizerConfig, split_weight
from services.quantizer.errors import QuantizerError
from services.quantizer.identity import draft_manifest
from services.quantizer.inputs import read_inputs
from services.quantizer.job import run
from services.quantizer.source import Source
from services.quantizer.texts import BUNDLED_EVALUATION
from weft.config import ConfigError

DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.fixture
def configure(make_checkpoint, tmp_path):
    """configure(**changes) -> the configuration of a run of seconds."""
    source = make_checkpoint(num_hidden_layers=1)

    def make(**changes):
        values = {
            "samples": 6,
            "sequence_length": 16,
            "evaluation_tokens": 128,
            "group_size": 32,
            "threads": 1,
        }
        return QuantizerConfig(
            source=source, artifacts=tmp_path / "artifacts", name="tiny", **{**values, **changes}
        )

    return make


@pytest.fixture
def read():
    """read(config) -> Inputs."""
    return lambda config: read_inputs(config, Source(config.source, torch.device("cpu")))


def write_lines(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def texts_of(seed, count):
    return [{"text": f"Text {seed} number {i} is about the {i * i % 97} of {i}."} for i in range(count)]


def test_documents_are_packed_and_begin_as_texts_begin(tmp_path):
    tokenizer = load_tokenizer(DEMO)
    bos = tokenizer.encode("").ids
    assert len(bos) == 1
    documents = ["one two three.", "four five", "<|bos|>six seven eight"]
    ids = [tokenizer.encode(text.removeprefix("<|bos|>"), add_special_tokens=False).ids for text in documents]
    stream = [*ids[0], *bos, *ids[1], *bos, *ids[2]]
    (window,) = windows(tokenizer, documents, len(stream) + 1).tolist()
    assert window == bos + stream
    # A window that would begin with a document's beginning has it once, as its own.
    parts = windows(tokenizer, documents, len(ids[0]) + 1)
    assert parts[0].tolist() == bos + ids[0]
    assert parts[1].tolist()[:2] == [*bos, ids[1][0]]
    assert windows(tokenizer, documents, 500).shape == (0, 500)


def test_a_long_text_is_read_in_pieces(monkeypatch):
    tokenizer = load_tokenizer(DEMO)
    text = "\n\n".join(f"Paragraph {i} has some words of its own, and {i * 7} more." for i in range(200))
    whole = windows(tokenizer, text, 32)
    monkeypatch.setattr("services.quantizer.calibration._CHUNK_CHARS", 500)
    assert np.array_equal(windows(tokenizer, text, 32), whole)


def test_files_weights_and_duplicates_are_told(configure, read, tmp_path):
    long = write_lines(tmp_path / "long.jsonl", texts_of(1, 120))
    talk = [{"messages": [{"role": "user", "content": f"How is number {i} today?"}]} for i in range(60)]
    chats = write_lines(tmp_path / "chats.jsonl", [*talk, *talk[:7]])
    inputs = read(configure(calibration=(Path(f"{long}@1"), Path(f"{chats}@2")), samples=9))
    assert inputs.calibration.shape == (9, 16)
    first, second = inputs.description["calibration"]
    assert (first["file"], first["chosen"], second["chosen"]) == ("long.jsonl", 3, 6)
    assert (second["documents"], second["duplicate_documents"]) == (67, 7)
    assert second["tokens"] == 96
    assert [entry["file"] for entry in inputs.description["evaluation"]] == [
        p.name for p in BUNDLED_EVALUATION
    ]
    # The conversations are in it as the template writes them.
    user = load_tokenizer(DEMO).token_to_id("<|user|>")
    assert (inputs.calibration[3:] == user).any()
    assert not (inputs.calibration[:3] == user).any()


def test_a_token_budget_is_samples_by_another_name(configure):
    asked = configure(samples=None, calibration_tokens=100)
    assert asked.samples == 6  # of 16 tokens
    assert asked.recipe("x") == configure(samples=6).recipe("x")
    assert configure(samples=6, calibration_tokens=111).samples == 6
    assert configure(samples=None).samples == 128
    assert dataclasses.replace(asked, seed=3).samples == 6
    with pytest.raises(ConfigError, match="100 tokens are 6 windows of 16, --samples says 7"):
        configure(samples=7, calibration_tokens=100)
    with pytest.raises(ConfigError, match="15 tokens are 0 windows of 16"):
        configure(samples=None, calibration_tokens=15)
    with pytest.raises(ConfigError, match="--calibration-tokens"):
        configure(samples=None, calibration_tokens=-5)


def test_weights_are_told_from_names():
    assert split_weight(Path("a.txt@2.5")) == (Path("a.txt"), 2.5)
    assert split_weight(Path("me@home/a.txt")) == (Path("me@home/a.txt"), None)
    assert split_weight(Path("a@2@3")) == (Path("a@2"), 3.0)
    assert split_weight(Path("a@nan")) == (Path("a@nan"), None)


def test_a_weight_of_nothing_is_wrong_usage(configure):
    with pytest.raises(ConfigError, match=r"--calibration: 'a\.txt@0': a weight of zero"):
        configure(calibration=(Path("a.txt@0"),))


def test_weights_and_kinds_make_another_artifact(configure, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(1, 3))
    plain, again, weighted = (
        draft_manifest(configure(calibration=(Path(name),))) for name in (path, path, f"{path}@2")
    )
    assert plain == again
    assert weighted.calibration_digest == plain.calibration_digest
    assert weighted.recipe != plain.recipe


def test_overlap_with_the_evaluation_is_refused_unless_nothing_is_evaluated(configure, read, tmp_path):
    copied = BUNDLED_EVALUATION[0].read_text()[5000:9000]
    path = write_lines(tmp_path / "mine.jsonl", [*texts_of(1, 40), {"text": copied}])
    with pytest.raises(QuantizerError, match=r"mine\.jsonl overlaps the evaluation text .*dubliners\.txt"):
        read(configure(calibration=(path,)))
    assert read(configure(calibration=(path,), evaluation_tokens=0)).evaluation is None


def test_a_file_that_adds_nothing_is_refused(configure, read, tmp_path):
    first = write_lines(tmp_path / "first.jsonl", texts_of(1, 40))
    again = write_lines(tmp_path / "again.jsonl", texts_of(1, 20))
    with pytest.raises(
        QuantizerError, match=r"again\.jsonl: all of it is in the calibration files before it"
    ):
        read(configure(calibration=(first, again)))


def test_one_token_is_refused_with_the_length_that_would_do_and_then_taken(configure, read, tmp_path):
    path = tmp_path / "word.txt"
    path.write_text("a")
    with pytest.raises(
        QuantizerError, match=r"word\.txt holds fewer .* 16; .* --sequence-length 2, which is"
    ):
        read(configure(calibration=(path,)))
    config = configure(calibration=(path,), sequence_length=2)
    assert read(config).calibration.shape == (1, 2)
    artifact = run(config)
    assert all(error.chosen <= error.rounding for error in artifact.manifest.linears.values())
