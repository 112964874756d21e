"""Several processes that each carry out their share of a run, for servers that outrun one process.

Each child has an event loop and a transport of its own; orders and results go through a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from cli.bench.crew import Alone, make_transport
from cli.bench.driver import Assignment, Outcome
from cli.bench.settings import Settings
from cli.bench.transport import BenchError, Facts
from cli.bench.workloads import Workload

START_S = 60.0
STOP_S = 10.0


class Processes:
    """A crew of children. Conversations are dealt out by number, so their sum is the run of one process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._children: list[_Child] = []

    async def open(self, facts: Facts, workload: Workload) -> None:
        """Start the children and wait until all are connected."""
        context = multiprocessing.get_context("spawn")
        for share in range(self._settings.num_processes):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._settings, facts, workload)
            process = context.Process(target=_child, args=arguments, name=f"weft-bench-{share}", daemon=True)
            process.start()
            theirs.close()
            self._children.append(_Child(process, ours))
        try:
            async with asyncio.timeout(START_S):
                await asyncio.gather(*(child.answer() for child in self._children))
        except TimeoutError:
            raise BenchError(f"the processes did not get ready within {START_S:g} s") from None

    async def run(self, assignment: Assignment) -> list[Outcome]:
        """Deal it out and collect."""
        for share, child in enumerate(self._children):
            child.send(replace(assignment, share=share, num_shares=len(self._children)))
        return list(await asyncio.gather(*(child.answer() for child in self._children)))

    def stop(self) -> None:
        """Tell them."""
        for child in self._children:
            child.send("stop")

    def progress(self) -> tuple[int, int] | None:
        """They do not tell before the end."""
        return None

    async def close(self) -> None:
        """Let them end; what does not is killed."""
        for child in self._children:
            child.send("stop")  # one may still run, where another has failed
            child.send("close")
        for child in self._children:
            await asyncio.to_thread(child.process.join, STOP_S)
            if child.process.is_alive():
                child.process.kill()
            child.pipe.close()


class _Child:
    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe

    def send(self, order: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, and `answer` says so
            self.pipe.send(order)

    async def answer(self) -> Any:
        """What it says next. Raises BenchError for its failure or its end."""
        try:
            found = await asyncio.to_thread(self.pipe.recv)
        except (EOFError, OSError):
            raise BenchError(f"{self.process.name} has ended before its time") from None
        if isinstance(found, BenchError):
            raise found
        return found


def _child(pipe: Connection, settings: Settings, facts: Facts, workload: Workload) -> None:
    # Ctrl-C in a terminal reaches the whole group; the parent tells when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(pipe, settings, facts, workload))


async def _serve(pipe: Connection, settings: Settings, facts: Facts, workload: Workload) -> None:
    loop = asyncio.get_running_loop()
    transport = make_transport(settings, settings.num_processes)
    crew = Alone(settings, transport)
    orders: asyncio.Queue[Any] = asyncio.Queue()

    def read() -> None:
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            crew.stop()  # the parent is gone
            order = "close"
        if order == "stop":
            crew.stop()
        else:
            orders.put_nowait(order)

    try:
        await transport.open()
        await crew.open(facts, workload)
        pipe.send("ready")
        loop.add_reader(pipe.fileno(), read)
        while isinstance(order := await orders.get(), Assignment):
            (outcome,) = await crew.run(order)
            pipe.send(outcome)
    except BenchError as error:
        pipe.send(error)
    finally:
        with contextlib.suppress(Exception):
            loop.remove_reader(pipe.fileno())
        await transport.close()
