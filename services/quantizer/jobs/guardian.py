"""Stands between the job service and a run: `guardian.py GRACE_SECONDS PROGRAM ARGUMENT...`.

Standard input is its leash. When it closes - the service stops the run, or the service is gone, kill -9
included - the run's whole process group gets SIGTERM, after the grace SIGKILL. What the run leaves behind in
its group when it ends is killed as well. Exit status: the run's, 128 + n after signal n. Standard library
only, and started by path, so that it costs little.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the program to its end, or to the end of standard input and the grace."""
    grace_s = float(arguments[0])
    # The terminal's and the service manager's signals are for the service, which then pulls the leash.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        arguments[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_in_child
    )
    try:
        return _watch(child, grace_s)
    finally:
        _signal_group(child.pid, signal.SIGKILL)


def _watch(child: "subprocess.Popen[bytes]", grace_s: float) -> int:
    deadline = None
    while True:
        code = child.poll()
        if code is not None:
            return code if code >= 0 else 128 - code
        if deadline is None:
            if select.select([0], [], [], _POLL_S)[0] and not os.read(0, 4096):
                _signal_group(child.pid, signal.SIGTERM)
                deadline = time.monotonic() + grace_s
        elif time.monotonic() >= deadline:
            _signal_group(child.pid, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(_POLL_S)


def _in_child() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        # Should the guardian itself be killed, the run goes with it. It has one thread, so nothing is locked.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
