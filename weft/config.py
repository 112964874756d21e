"""Configuration of a process: a frozen dataclass, filled from flags, then WEFT_* variables, then defaults.

The only reader of the environment. Knows no service: each declares its own dataclass.

    @dataclass(frozen=True)
    class EngineConfig:
        listen: Address = option(parse_address("127.0.0.1:50051"), "address to listen on",
        parse=parse_address)

    config = load_config(EngineConfig, argv, prog="python -m services.engine serve",
    env_prefix="WEFT_ENGINE_")

The field `kv_memory` is the flag `--kv-memory` and the variable WEFT_ENGINE_KV_MEMORY. A bad value ends the
process with exit code 2 and one line that names the flag or the variable.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

REQUIRED: Any = dataclasses.MISSING
_KEY = "weft.option"
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {f"{_letter}ib": 1024**_power, _letter: 1024**_power, f"{_letter}b": 1000**_power}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

T = TypeVar("T")


class ConfigError(ValueError):
    """A bad value. `flag` is named in the message to the user, as in "--num-blocks"."""

    def __init__(self, flag: str, reason: str) -> None:
        super().__init__(f"{flag}: {reason}")
        self.flag = flag
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class _Option:
    help: str
    parse: Callable[[str], Any] | None
    choices: tuple[str, ...] | None
    metavar: str | None
    is_secret: bool


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    is_secret: bool = False,
) -> Any:
    """A field that is an option. `default` REQUIRED: a flag or variable must be given.

    `parse` turns text into the value and raises ValueError with a reason; by default it follows from the
    annotation: str, int, float, bool, Path, or one of them with None. `is_secret` masks the value where it
    is shown.
    """
    metadata = {_KEY: _Option(help, parse, tuple(choices) if choices else None, metavar, is_secret)}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def parse_size(text: str) -> int:
    """Bytes: "1GiB", "512MiB", "1.5G" (powers of 1024), "2GB" (powers of 1000), or a plain number."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size; write for instance 512MiB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_bool(text: str) -> bool:
    """1/0, true/false, yes/no, on/off."""
    lowered = text.strip().lower()
    if lowered not in _TRUE + _FALSE:
        raise ValueError(f"{text!r} is neither true nor false")
    return lowered in _TRUE


def parse_float(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{text!r} is not finite")
    return value


def parse_int(text: str) -> int:
    """A whole number; underscores may group digits."""
    if len(text) > 20:
        raise ValueError("too many digits")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None


_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: parse_int,
    float: parse_float,
    bool: parse_bool,
    Path: Path,
}


@dataclasses.dataclass(frozen=True)
class _Field:
    """One option of a config class, resolved."""

    name: str
    option: _Option
    parse: Callable[[str], Any]
    is_bool: bool
    default: Any

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _fields(config_class: type[Any]) -> list[_Field]:
    hints = typing.get_type_hints(config_class)
    found = []
    for field in dataclasses.fields(config_class):
        declared: _Option | None = field.metadata.get(_KEY)
        if declared is None:
            raise TypeError(f"{config_class.__name__}.{field.name} is no option()")
        kinds = _without_none(hints[field.name])
        parse = declared.parse or (_PARSERS.get(kinds[0]) if len(kinds) == 1 else None)
        if parse is None:
            raise TypeError(f"{config_class.__name__}.{field.name} needs a parse function")
        found.append(_Field(field.name, declared, parse, kinds == [bool], field.default))
    # Help begins with what is the service's own; what it has in common with others follows.
    own = vars(config_class).get("__annotations__", {})
    return sorted(found, key=lambda field: field.name not in own)


def _without_none(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return [hint]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(fields: list[_Field], prog: str, description: str | None, env_prefix: str) -> _Parser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for field in fields:
        default = "required" if field.default is dataclasses.MISSING else f"default {shown(field.default)}"
        help_text = f"{field.option.help} ({default}; {env_prefix}{field.name.upper()})".replace("%", "%%")
        if field.is_bool:
            parser.add_argument(
                field.flag, dest=field.name, action=argparse.BooleanOptionalAction, help=help_text
            )
        else:
            metavar = field.option.metavar
            if field.option.choices:
                metavar = "{" + ",".join(field.option.choices) + "}"
            parser.add_argument(field.flag, dest=field.name, help=help_text, metavar=metavar)
    return parser


def _value(field: _Field, text: str, source: str) -> Any:
    """The parsed value, or ConfigError naming `source`."""
    if field.option.choices and text not in field.option.choices:
        raise ConfigError(source, f"{text!r} is none of {', '.join(field.option.choices)}")
    try:
        return field.parse(text)
    except ValueError as error:
        raise ConfigError(source, str(error)) from None


def load_config(
    config_class: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    env_prefix: str = "WEFT_",
    environ: Mapping[str, str] | None = None,
    description: str | None = None,
) -> T:
    """Fill a config class: flag before variable before default.

    Exits with code 2 and one line on standard error when a value is bad or missing; 0 after `--help`.
    Checks over several fields belong into `__post_init__`, which raises ConfigError. An empty variable
    counts as unset.
    """
    environ = os.environ if environ is None else environ
    fields = _fields(config_class)
    parser = _parser(fields, prog, description, env_prefix)
    flags = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {}
    try:
        for field in fields:
            variable = env_prefix + field.name.upper()
            given = flags[field.name]
            if given is not None:
                values[field.name] = given if field.is_bool else _value(field, given, field.flag)
            elif environ.get(variable):
                values[field.name] = _value(field, environ[variable], variable)
            elif field.default is dataclasses.MISSING:
                raise ConfigError(field.flag, f"is required (or set {variable})")
        return config_class(**values)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        sys.exit(2)


def build_config(config_class: type[T], values: Mapping[str, str | bool]) -> T:
    """A config from option names and what their flags would be given (a bool for a flag that takes no value),
    without the environment. Raises ConfigError, naming the flag, for a bad, missing or unknown one.
    """
    fields = {field.name: field for field in _fields(config_class)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        field = fields.get(name)
        if field is None:
            raise ConfigError("--" + name.replace("_", "-"), "no such option")
        if field.is_bool != isinstance(value, bool):
            raise ConfigError(field.flag, "takes no value" if field.is_bool else "takes a value")
        found[name] = value if isinstance(value, bool) else _value(field, value, field.flag)
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in found:
            raise ConfigError(field.flag, "is required")
    return config_class(**found)


def flags_of(values: Mapping[str, str | bool]) -> list[str]:
    """The same as words of a command line."""
    return [
        "--" + ("" if value else "no-") + name.replace("_", "-")
        if isinstance(value, bool)
        else f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
    ]


def environment_without(prefix: str) -> dict[str, str]:
    """The variables that a child process may inherit: all but those that begin with `prefix`."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefix)}


@contextmanager
def environment_with(values: Mapping[str, str]) -> Iterator[None]:
    """This process's variables with `values` in them, for a library that takes settings from nowhere else;
    as before afterwards. For the main thread.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def shown(value: Any) -> Any:
    """A value as it goes into a log line: numbers, flags and None as they are, all else as text."""
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def effective(config: Any) -> dict[str, Any]:
    """Every option and its value, for the one log line at the start. Secrets are masked."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        declared: _Option | None = field.metadata.get(_KEY)
        value = getattr(config, field.name)
        is_secret = declared is not None and declared.is_secret
        result[field.name] = "***" if is_secret and value is not None else shown(value)
    return result


def variable(name: str) -> str | None:
    """One WEFT_* variable that belongs to no process's config, or None. Raises ValueError for another
    name.
    """
    if not name.startswith("WEFT_"):
        raise ValueError(f"{name} is none of ours")
    return os.environ.get(name) or None


def keep_grpc_quiet() -> None:
    """Keep gRPC's own lines off standard error, unless GRPC_VERBOSITY says otherwise. Must come before
    grpc is imported.

    Every failed handshake would be a line of text among lines of JSON, written by whoever connects.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def let_waiting_threads_sleep() -> None:
    """Make OpenMP's waiting threads spin for some 50 us and then sleep, unless OMP_WAIT_POLICY or
    GOMP_SPINCOUNT says otherwise.

    Must come before torch is imported. By default they spin for milliseconds, and a spinning thread takes the
    core of the process it waits for: on two busy cores the engine ran 20 times slower so. One that sleeps at
    once has to be woken for every operation, which is a quarter to a third of a decode step.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        os.environ["OMP_WAIT_POLICY"] = "passive"  # what other runtimes than GNU's read
