"""Chat templates, rendered where they can do no harm: in child processes that can be killed.

A thread that spins cannot be stopped and an allocation cannot be taken back, so a template gets a process
of its own, with a limit on memory, on CPU per render, and a clock held by this side. Two are kept ready;
one that was killed is replaced in the background. Knows nothing of tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft import logs

_WORKER = Path(__file__).with_name("template_worker.py")
MAX_TEMPLATE_CHARS = 1 << 20
log = logs.get_logger("gateway.template")


class TemplateError(Exception):
    """The template or its process is at fault, not the client. The text is safe to show."""


class ConversationRefused(Exception):
    """The template does not take this conversation. The text says why and is safe to show."""


class TemplateBusy(Exception):
    """Every child renders for somebody else; later may be better."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one render may use. `wall_s` is the parent's own clock, for a child that does not even run;
    `queue_s` is how long a render waits for a child.
    """

    cpu_s: float = 2.0
    wall_s: float = 6.0
    queue_s: float = 4.0
    memory_bytes: int = 512 << 20
    max_output_chars: int = 2 << 20
    start_s: float = 20.0


class _Worker:
    """One child process. Renders one conversation at a time."""

    def __init__(self, process: asyncio.subprocess.Process, limits: TemplateLimits) -> None:
        self._process = process
        self._limits = limits

    @classmethod
    async def start(cls, template: str, constants: Mapping[str, Any], limits: TemplateLimits) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(_WORKER),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            # A character takes at most 12 bytes as JSON escapes.
            limit=12 * limits.max_output_chars + 4096,
        )
        worker = cls(process, limits)
        setup = {
            "template": template,
            "constants": dict(constants),
            "cpu_s": limits.cpu_s,
            "memory_bytes": limits.memory_bytes,
            "max_output_chars": limits.max_output_chars,
        }
        try:
            answer = await worker.ask(setup, limits.start_s)
            if "error" in answer:
                raise TemplateError(f"the model's chat template is invalid: {answer['message']}")
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """One line out, one line back. Raises TimeoutError, and EOFError when the child died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise TemplateError("the template's process has no pipes")
        async with asyncio.timeout(timeout_s):
            try:
                stdin.write(json.dumps(message).encode("ascii") + b"\n")
                await stdin.drain()
                line = await stdout.readline()
            except (ConnectionError, ValueError) as error:
                raise EOFError(str(error)) from error
        if not line.endswith(b"\n"):
            raise EOFError("the template's process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def kill(self) -> None:
        """End the child at once and wait until it is gone. May come twice."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid


class ChatTemplate:
    """The chat template of one artifact and the children that render it. `start` before use, `close` at the
    end.
    """

    def __init__(
        self,
        template: str,
        constants: Mapping[str, Any],
        *,
        limits: TemplateLimits | None = None,
        num_workers: int = 2,
    ) -> None:
        if len(template) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"the model's chat template is longer than {MAX_TEMPLATE_CHARS} characters")
        self.source = template
        self._constants = dict(constants)
        self._limits = limits or TemplateLimits()
        self._num_workers = num_workers
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self._refills: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.num_killed = 0

    async def start(self) -> None:
        """Start the children. Raises TemplateError when the template does not even compile."""
        try:
            starts = (self._add_worker() for _ in range(self._num_workers))
            # Every start is waited for, so that a child that comes late is not forgotten.
            for outcome in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        except (EOFError, TimeoutError, OSError) as error:
            await self.close()
            raise TemplateError("the template's process does not start") from error
        except BaseException:
            await self.close()
            raise

    async def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the model wants it. Raises ConversationRefused, TemplateError or
        TemplateBusy.
        """
        try:
            async with asyncio.timeout(self._limits.queue_s):
                worker = await self._idle.get()
        except TimeoutError:
            raise TemplateBusy("every chat template process is busy") from None
        is_reusable = False
        try:
            answer = await worker.ask(
                {"messages": messages, "add_generation_prompt": add_generation_prompt}, self._limits.wall_s
            )
            is_reusable = answer.get("error") != "resources"
        except (TimeoutError, EOFError):
            raise TemplateError(
                f"the model's chat template used more than its {self._limits.cpu_s:g} s or its memory"
            ) from None
        finally:
            if is_reusable and not self._is_closed:
                self._idle.put_nowait(worker)
            else:
                self._replace(worker)
        return _text_of(answer)

    async def close(self) -> None:
        """Kill the children. A render under way ends with TemplateError."""
        self._is_closed = True
        for task in list(self._refills):
            task.cancel()
        await asyncio.gather(*self._refills, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._workers))
        self._workers.clear()

    @property
    def pids(self) -> list[int]:
        """The children's process ids."""
        return [worker.pid for worker in self._workers]

    async def _add_worker(self) -> None:
        worker = await _Worker.start(self.source, self._constants, self._limits)
        self._workers.add(worker)
        self._idle.put_nowait(worker)

    def _replace(self, worker: _Worker) -> None:
        self.num_killed += 1
        task = asyncio.get_running_loop().create_task(self._refill(worker))
        self._refills.add(task)
        task.add_done_callback(self._refills.discard)

    async def _refill(self, worker: _Worker) -> None:
        await worker.kill()
        self._workers.discard(worker)
        delay_s = 0.0
        while not self._is_closed:
            await asyncio.sleep(delay_s)
            try:
                await self._add_worker()
                return
            except (TemplateError, EOFError, TimeoutError, OSError) as error:
                log.warning("template process does not start", error=str(error))
                delay_s = min(5.0, 2 * delay_s + 0.1)


def _text_of(answer: dict[str, Any]) -> str:
    kind = answer.get("error")
    if kind is None:
        return str(answer["text"])
    message = str(answer.get("message", ""))
    if kind == "refused":
        raise ConversationRefused(message or "the model's chat template does not take this conversation")
    if kind == "render":
        raise ConversationRefused(f"the model's chat template cannot render this conversation: {message}")
    if kind == "output":
        raise ConversationRefused(message)
    raise TemplateError(f"the model's chat template used too much memory or depth: {message}")
