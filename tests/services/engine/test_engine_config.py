"""The flags of the engine: what is taken, and what is refused with the flag's name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.engine.application import runner_config
from services.engine.config import EngineConfig, load


def test_defaults(monkeypatch):
    monkeypatch.delenv("WEFT_ENGINE_LISTEN", raising=False)
    config = load(["--source", "x"])
    assert str(config.listen) == "127.0.0.1:50051"
    assert (config.block_size, config.max_batch_size, config.max_batched_tokens) == (128, 64, 2048)
    assert config.deterministic is None
    assert config.metrics is None


def test_flags_reach_the_runner():
    flags = "--artifacts /a --model m --version v --dtype bfloat16 --no-deterministic --block-size 16"
    cache = "--kv-dtype int8 --kv-memory 1GiB"
    limits = "--max-batch-size 8 --max-batched-tokens 256 --max-model-len 512 --threads 2"
    config = load(f"{flags} {cache} {limits}".split())
    runner = runner_config(config)
    assert (runner.artifacts, runner.model, runner.version) == (Path("/a"), "m", "v")
    assert (runner.dtype, runner.is_deterministic, runner.block_size) == ("bfloat16", False, 16)
    assert runner.kv_dtype == "int8"
    assert (runner.kv_memory_bytes, runner.num_blocks) == (1 << 30, None)
    assert (runner.max_batch_size, runner.max_batched_tokens) == (8, 256)
    assert (runner.max_model_len, runner.num_threads) == (512, 2)


def test_the_cache_directory_is_the_users_when_it_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runner_config(load(["--source", "x"])).cache_dir == tmp_path / ".cache" / "weft"
    assert not list(tmp_path.iterdir()), "nothing is made before there is something to keep"
    assert runner_config(load(["--source", "x", "--cache-dir", "/c"])).cache_dir == Path("/c")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK and real(path, mode))
    assert runner_config(load(["--source", "x"])).cache_dir is None


@pytest.mark.parametrize("home", ["file", "file/in/it", "dangling"])
def test_an_odd_home_is_no_error(home, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    assert runner_config(load(["--source", "x"])).cache_dir is None


def test_a_user_without_a_home_is_no_error(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert runner_config(load(["--source", "x"])).cache_dir is None


def test_variables(monkeypatch):
    monkeypatch.setenv("WEFT_ENGINE_SOURCE", "/somewhere")
    monkeypatch.setenv("WEFT_ENGINE_DETERMINISTIC", "yes")
    config = load([])
    assert config.source == Path("/somewhere")
    assert config.deterministic is True


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--artifacts"),
        (["--source", "x", "--artifacts", "y", "--model", "m"], "--artifacts"),
        (["--artifacts", "y"], "--model"),
        (["--source", "x", "--kv-dtype", "int2"], "--kv-dtype"),
        (["--source", "x", "--version", "v"], "--version"),
        (["--source", "x", "--block-size", "100"], "--block-size"),
        (["--source", "x", "--dtype", "float8"], "--dtype"),
        (["--source", "x", "--num-blocks", "1", "--kv-memory", "1GiB"], "--num-blocks"),
        (["--source", "x", "--num-blocks", "0"], "--num-blocks"),
        (["--source", "x", "--kv-memory", "1 potato"], "--kv-memory"),
        (["--source", "x", "--max-batch-size", "0"], "--max-batch-size"),
        (["--source", "x", "--max-batch-size", "128", "--max-batched-tokens", "127"], "--max-batched-tokens"),
        (["--source", "x", "--max-queue-size", str(1 << 21)], "--max-queue-size"),
        (["--source", "x", "--max-batched-tokens", str(1 << 32)], "--max-batched-tokens"),
        (["--source", "x", "--threads", "-1"], "--threads"),
        (["--source", "x", "--drain-seconds", "-1"], "--drain-seconds"),
        (["--source", "x", "--drain-seconds", "nan"], "--drain-seconds"),
        (["--source", "x", "--listen", "nowhere"], "--listen"),
        (["--source", "x", "--log-level", "loud"], "--log-level"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(flags, named, capsys):
    with pytest.raises(SystemExit) as caught:
        load(flags)
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert named in output


def test_it_is_frozen():
    assert EngineConfig.__dataclass_params__.frozen  # type: ignore[attr-defined]
