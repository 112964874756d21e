"""The child process that renders one chat template: run as a file, never imported by the gateway.

Speaks lines of JSON on its standard input and output. The first line is the template and its constants; every
further line is one conversation. The sandbox stops a template from reaching Python; the limits of this
process stop it from eating the machine. It needs nothing but the standard library and jinja2.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_PR_SET_PDEATHSIG = 1


class RefusedByTemplate(Exception):
    """The template itself called raise_exception: the conversation has a shape it does not take."""


class OutputTooLong(Exception):
    """The template made more text than allowed."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; a prompt takes them as they are."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements inside, without the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Serve until standard input ends."""
    _die_with_parent()
    setup = json.loads(sys.stdin.buffer.readline())
    limit = int(setup["memory_bytes"])
    with contextlib.suppress(ValueError, OSError):  # not every system limits address space
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    _limit_cpu(float(setup["cpu_s"]))  # constant expressions are computed while the template compiles
    try:
        template = _environment().from_string(setup["template"])
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        _answer({"error": "template", "message": f"{type(error).__name__}: {error}"[:300]})
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    _answer({"ok": True})
    for line in sys.stdin.buffer:
        variables = json.loads(line)
        _limit_cpu(float(setup["cpu_s"]))
        answer = _render(template, {**setup["constants"], **variables}, int(setup["max_output_chars"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(answer)


def _render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> dict[str, Any]:
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in template.generate(**variables):
            num_chars += len(piece)
            if num_chars > max_chars:
                raise OutputTooLong
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except RefusedByTemplate as error:
        return {"error": "refused", "message": str(error)[:300]}
    except OutputTooLong:
        return {
            "error": "output",
            "message": f"the rendered conversation is longer than {max_chars} characters",
        }
    except (MemoryError, RecursionError) as error:
        pieces.clear()
        return {"error": "resources", "message": type(error).__name__}
    except Exception as error:
        return {"error": "render", "message": f"{type(error).__name__}: {error}"[:300]}


def _environment() -> ImmutableSandboxedEnvironment:
    """What published templates expect: Hugging Face's whitespace rules, loop controls and three functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise RefusedByTemplate(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of jinja2's own filter: a prompt is no web page."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _limit_cpu(cpu_s: float) -> None:
    """Let the kernel end this process once it has used `cpu_s` more: by timer, and surely by rlimit."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(
        resource.RLIMIT_CPU,
        (int(usage.ru_utime + usage.ru_stime + cpu_s) + 2, resource.RLIM_INFINITY),
    )


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent is gone. Elsewhere the end of standard input does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
