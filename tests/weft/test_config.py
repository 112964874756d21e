"""Flag before variable before default; a bad value is one line and exit code 2."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from weft.config import (
    REQUIRED,
    ConfigError,
    build_config,
    effective,
    environment_without,
    flags_of,
    load_config,
    option,
    parse_size,
)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    name: str = option(REQUIRED, "a name")
    count: int = option(3, "a count")
    ratio: float = option(0.5, "a ratio, 100%")
    memory: int | None = option(None, "bytes", parse=parse_size)
    path: Path | None = option(None, "a path")  # noqa: RUF009
    is_fast: bool | None = option(None, "a switch")
    mode: str = option("a", "a mode", choices=("a", "b"))
    password: str | None = option(None, "a secret", is_secret=True)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError("--count", "must not be negative")


def load(*argv: str, **environ: str) -> SampleConfig:
    return load_config(SampleConfig, argv, prog="sample", env_prefix="WEFT_X_", environ=environ)


def test_defaults_then_variables_then_flags():
    assert load("--name", "n").count == 3
    assert load("--name", "n", WEFT_X_COUNT="4").count == 4
    assert load("--name", "n", "--count", "5", WEFT_X_COUNT="4").count == 5
    assert load(WEFT_X_NAME="env").name == "env"
    assert load("--name", "n", WEFT_X_COUNT="").count == 3


def test_types():
    config = load("--name=n", "--memory", "1GiB", "--path", "/tmp/x", "--is-fast", "--ratio", "1e-3")
    assert (config.memory, config.path, config.is_fast, config.ratio) == (2**30, Path("/tmp/x"), True, 1e-3)
    assert load("--name=n", "--no-is-fast").is_fast is False
    assert load("--name=n", WEFT_X_IS_FAST="off").is_fast is False
    assert load("--name=n").is_fast is None


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("--name", "n").count = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "environ", "names"),
    [
        ([], {}, "--name"),
        (["--name", "n", "--count", "x"], {}, "--count"),
        (["--name", "n", "--count", "-1"], {}, "--count"),
        (["--name", "n", "--count", "9" * 5000], {}, "--count"),
        (["--name", "n", "--ratio", "nan"], {}, "--ratio"),
        (["--name", "n", "--ratio", "1e999"], {}, "--ratio"),
        (["--name", "n", "--memory", "1 potato"], {}, "--memory"),
        (["--name", "n", "--mode", "c"], {}, "--mode"),
        (["--name", "n", "--nope", "c"], {}, "--nope"),
        (["--name", "n", "--cou", "4"], {}, "--cou"),
        (["--name", "n", "--count"], {}, "--count"),
        (["--name", "n"], {"WEFT_X_COUNT": "many"}, "WEFT_X_COUNT"),
        (["--name", "n"], {"WEFT_X_IS_FAST": "maybe"}, "WEFT_X_IS_FAST"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_flag(argv, environ, names, capsys):
    with pytest.raises(SystemExit) as caught:
        load(*argv, **environ)
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert output.startswith("sample: ")
    assert names in output


def test_help_names_flags_defaults_and_variables(capsys):
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "a ratio, 100% (default 0.5; WEFT_X_RATIO)" in output
    assert "--is-fast, --no-is-fast" in output


def test_the_effective_config_masks_secrets():
    shown = effective(load("--name", "n", "--password", "hunter2", "--path", "/x"))
    assert shown["password"] == "***"
    assert shown["path"] == "/x"
    assert shown["count"] == 3
    assert effective(load("--name", "n"))["password"] is None


def test_a_field_without_an_option_is_a_mistake():
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        count: int = 3

    with pytest.raises(TypeError, match="count"):
        load_config(Wrong, [], prog="x", environ={})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("10", 10),
        ("1KiB", 1024),
        ("1k", 1024),
        ("1kB", 1000),
        ("1.5 GiB", 3 << 29),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1e3", "GiB", "1XiB", "1" * 30, "nan", "0x10"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_a_config_from_names_is_that_of_the_same_flags(monkeypatch):
    values = {"name": "n", "memory": "1GiB", "is_fast": False, "mode": "b"}
    monkeypatch.setenv("WEFT_X_COUNT", "9")
    built = build_config(SampleConfig, values)
    assert flags_of(values) == ["--name=n", "--memory=1GiB", "--no-is-fast", "--mode=b"]
    assert built == load(*flags_of(values))
    assert built.count == 3


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({}, "--name"),
        ({"name": "n", "count": "many"}, "--count"),
        ({"name": "n", "count": "-1"}, "--count"),
        ({"name": "n", "mode": "c"}, "--mode"),
        ({"name": "n", "is_fast": "yes"}, "--is-fast"),
        ({"name": "n", "count": True}, "--count"),
        ({"name": "n", "no_such": "1"}, "--no-such"),
    ],
)
def test_what_is_wrong_with_names_is_raised_and_names_the_flag(values, flag):
    with pytest.raises(ConfigError) as caught:
        build_config(SampleConfig, values)
    assert caught.value.flag == flag
    assert str(caught.value) == f"{flag}: {caught.value.reason}"


def test_a_child_does_not_inherit_what_is_meant_for_its_parent(monkeypatch):
    monkeypatch.setenv("WEFT_X_COUNT", "4")
    monkeypatch.setenv("WEFT_Y_COUNT", "5")
    left = environment_without("WEFT_X_")
    assert "WEFT_X_COUNT" not in left
    assert left["WEFT_Y_COUNT"] == "5"
