"""Several gateways behind one address: `--processes N` starts N that share the ports, and keeps them.

The kernel gives each new connection to one of them; each has its own links to the engines and knows only its
own requests, so what needs one owner of a request is refused. The launcher serves nothing itself: it starts,
restarts with backoff, and passes signals on. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from weft import logs
from weft.rpc.address import Address

MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
# A process that lived so long may be started again at once.
STEADY_S = 10.0
# These end a process that cannot start, today or at the next try.
CANNOT_START = (1, 2)
_PR_SET_PDEATHSIG = 1
log = logs.get_logger("gateway.processes")


class PortTaken(OSError):
    """The address cannot be listened on. The message is one line for a person."""


@dataclass(slots=True)
class Child:
    """One place among the processes, and who holds it now."""

    index: int
    process: asyncio.subprocess.Process | None = None
    num_starts: int = 0
    exit_code: int = 0


class Launcher:
    """Runs `command(index)` for each index below `num_processes` until told to stop.

    The exit code is 0 when all ended well after SIGTERM or SIGINT, else the first other one; 1 after a second
    signal, which kills. A process that dies is started again, after a pause that grows while it keeps dying.
    One that never served and ends with 1 or 2 cannot start, and then neither can the rest. `reloads`: a
    hangup is passed on, for the processes read files again at one; else it ends them, as it ends any.
    """

    def __init__(
        self, num_processes: int, command: Callable[[int], Sequence[str]], *, reloads: bool = False
    ) -> None:
        self.children = [Child(index) for index in range(num_processes)]
        self._command = command
        self._reloads = reloads
        self._stop = asyncio.Event()
        self._failure = 0

    async def run(self) -> int:
        """Start, watch, and return the exit code."""
        with self._signals():
            tasks = [asyncio.create_task(self._keep(child)) for child in self.children]
            try:
                await self._stop.wait()
                self._tell(signal.SIGTERM)
                await asyncio.gather(*tasks)
            finally:
                self._tell(signal.SIGKILL)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        codes = [self._failure, *(child.exit_code for child in self.children)]
        return next((code if code > 0 else 1 for code in codes if code), 0)

    def on_signal(self, number: int) -> None:
        """The first asks all processes to drain; the second kills them."""
        name = signal.Signals(number).name
        if self._stop.is_set():
            log.warning("second signal, killing", signal=name)
            self._failure = self._failure or 1
            self._tell(signal.SIGKILL)
        else:
            log.info("stopping", signal=name)
            self._stop.set()

    async def _keep(self, child: Child) -> None:
        backoff_s = MIN_BACKOFF_S
        while not self._stop.is_set():
            begun = time.monotonic()
            code = await self._live(child)
            lived_s = time.monotonic() - begun
            if self._stop.is_set():
                child.exit_code = code
                return
            if code in CANNOT_START and child.num_starts == 1 and lived_s < STEADY_S:
                log.error("a process cannot start", index=child.index, code=code)
                self._failure = self._failure or code
                self._stop.set()
                return
            backoff_s = MIN_BACKOFF_S if lived_s >= STEADY_S else min(2 * backoff_s, MAX_BACKOFF_S)
            log.warning("a process died", index=child.index, code=code, restart_s=backoff_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._stop.wait()

    async def _live(self, child: Child) -> int:
        """One life of a process. Its exit code; -N when signal N ended it. 1 when it could not be made."""
        child.num_starts += 1
        try:
            child.process = await asyncio.create_subprocess_exec(
                *self._command(child.index),
                stdin=asyncio.subprocess.DEVNULL,
                # A terminal's Ctrl-C reaches the launcher alone, which passes it on: twice would kill.
                start_new_session=True,
            )
        except OSError as error:
            log.error("a process cannot be made", index=child.index, reason=str(error))
            return 1
        log.info("process started", index=child.index, child_pid=child.process.pid)
        if self._stop.is_set():  # the signal came while it was being made
            self._tell(signal.SIGTERM)
        try:
            return await child.process.wait()
        finally:
            if child.process.returncode is not None:
                child.process = None

    def _tell(self, number: signal.Signals) -> None:
        for child in self.children:
            if child.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(number)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.on_signal, number)
        if self._reloads:
            loop.add_signal_handler(signal.SIGHUP, self._tell, signal.SIGHUP)
        try:
            yield
        finally:
            for number in (*numbers, *((signal.SIGHUP,) if self._reloads else ())):
                loop.remove_signal_handler(number)


def reserve(address: Address) -> tuple[socket.socket, Address]:
    """Hold a port for processes that share it, until the socket is closed: nobody else gets it, and 0 becomes
    a number. The socket does not listen, so the kernel gives it no connection. Raises PortTaken.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        # Once without sharing: another gateway's processes would let this one in among them.
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
        holder = socket.socket(family, kind, protocol)
        try:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(target)
        except OSError:
            holder.close()
            raise
    except OSError as error:
        raise PortTaken(f"cannot listen on {address}: {error.strerror or error}") from None
    return holder, address._replace(port=holder.getsockname()[1])


def launch(
    argv: Sequence[str],
    num_processes: int,
    listen: Address,
    http: Address | None,
    *,
    module: str,
    reloads: bool = False,
) -> int:
    """Run `python -m MODULE serve ARGV` so many times. Returns the exit code; raises PortTaken."""
    with contextlib.ExitStack() as stack:
        shared = []
        for flag, address in (("--listen", listen), ("--http", http)):
            if address is not None:
                holder, taken = reserve(address)
                stack.enter_context(holder)
                shared += [flag, str(taken)]
        log.info("sharing", addresses=shared[1::2], processes=num_processes)

        def command(index: int) -> list[str]:
            # A flag that is given twice counts as given last.
            own = ("--process-index", str(index), "--launcher-pid", str(os.getpid()))
            return [sys.executable, "-m", module, "serve", *argv, *shared, *own]

        async def run() -> int:
            return await Launcher(num_processes, command, reloads=reloads).run()

        return asyncio.run(run())


def end_with_parent(parent: int) -> None:
    """Ask Linux to tell this process to stop when `parent`, which started it, is gone, and stop if it is."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before this
        os.kill(os.getpid(), signal.SIGTERM)
