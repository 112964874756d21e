"""The child process that renders a chat template over conversations: run as a file, never imported.

A template comes with the checkpoint, so it is somebody's program. The sandbox keeps it from Python's insides;
the limits of this process keep it from the machine. Reads lines of JSON (first the limits, template and
constants, then one conversation each) and answers each conversation with one line; the first that fails ends
it. Standard library and jinja2 alone.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import sys
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The day that templates fall back to themselves where no clock is offered: equal runs give equal bytes.
_TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)


class _Refused(Exception):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}` encloses what a model said; here the enclosed text alone counts."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to the closing tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answer what standard input holds."""
    setup = json.loads(sys.stdin.buffer.readline())
    with contextlib.suppress(ValueError, OSError):  # not every system limits these
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (setup["cpu_s"], setup["cpu_s"] + 1))
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    budget = setup["max_total_chars"]
    try:
        template = _environment().from_string(setup["template"])
        for line in sys.stdin.buffer:
            limit = min(budget, setup["max_chars"])
            variables = {"add_generation_prompt": False, **setup["constants"], **json.loads(line)}
            pieces, size = [], 0
            for piece in template.generate(**variables):
                size += len(piece)
                if size > limit:
                    _answer(error=f"makes more than {limit} characters of it")
                    return
                pieces.append(piece)
            budget -= size
            _answer(text="".join(pieces))
    except _Refused as error:
        _answer(error=f"refuses it: {error}")
    except (MemoryError, RecursionError) as error:
        _answer(error=f"needs too much memory or depth ({type(error).__name__})")
    except TemplateError as error:
        _answer(error=f"fails: {type(error).__name__}: {error}")
    except Exception as error:  # whatever its expressions do to values of another type
        _answer(error=f"fails: {type(error).__name__}: {error}")


def _environment() -> ImmutableSandboxedEnvironment:
    """The whitespace rules, filters and functions that published templates count on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_TODAY.strftime)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: object) -> NoReturn:
    raise _Refused(str(message))


def _answer(**answer: str) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
