"""One compose project under test: commands, waits, crashes. Knows docker's command line, no protocol."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BASE_IMAGE = "python:3.11-slim-bookworm"


def docker(*words: str, check: bool = True, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """`docker WORDS`. AssertionError with what it printed when it fails and `check` is set."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout_s)
    if check:
        assert done.returncode == 0, f"docker {' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def free_port() -> int:
    """A port of this machine's loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComposeProject:
    """A clean checkout with its compose files, under a project name and image tag of its own."""

    def __init__(
        self, checkout: Path, name: str, environment: Mapping[str, str], files: Sequence[str | Path] = ()
    ) -> None:
        self.checkout = checkout
        self.name = name
        self.ports = {key: free_port() for key in ("grpc", "http", "jobs")}
        published = {f"WEFT_{key.upper()}_PORT": str(port) for key, port in self.ports.items()}
        self._environment = {**os.environ, **environment, **published}
        self._files = [word for file in ("docker-compose.yml", *files) for word in ("-f", str(file))]

    def compose(
        self, *words: str, check: bool = True, timeout_s: float = 600.0
    ) -> subprocess.CompletedProcess[str]:
        """`docker compose WORDS` in the checkout. AssertionError when it fails and `check` is set."""
        command = ["docker", "compose", *self._files, "-p", self.name, *words]
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check:
            assert done.returncode == 0, (
                f"compose {' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}\n{self.tail()}"
            )
        return done

    def tail(self) -> str:
        """The last lines of every container's log, for a failure's message."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.compose("logs", "--no-color", "--tail=15", check=False, timeout_s=60).stdout[-6000:]
        return ""

    def container(self, service: str, index: int = 1) -> str:
        """The name of a service's container."""
        return f"{self.name}-{service}-{index}"

    def state(self, service: str, index: int = 1) -> dict[str, Any]:
        """What `docker inspect` says."""
        found = json.loads(docker("inspect", self.container(service, index)).stdout)
        assert isinstance(found[0], dict)
        return found[0]

    def is_healthy(self, service: str, index: int = 1) -> bool:
        """Whether the container runs and its health check passes."""
        state = self.state(service, index)["State"]
        return state["Status"] == "running" and state["Health"]["Status"] == "healthy"

    def events(self, service: str) -> list[dict[str, Any]]:
        """The log of a service's first container since it was made: the lines of JSON."""
        found = []
        for line in docker("logs", self.container(service)).stderr.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(event := json.loads(line), dict):
                    found.append(event)
        return found

    def crash(self, service: str, index: int = 1) -> float:
        """kill -9 of a container's main process, from a container that sees the engine's processes. (`docker
        kill` would be a stop by hand: no restart policy follows it.) Returns the time before the signal.
        """
        pid = self.state(service, index)["State"]["Pid"]
        code = f"import os, time; t = time.time(); os.kill({pid}, 9); print(t)"
        killer = ["--rm", "--pid=host", "--network=none", "--entrypoint=python", BASE_IMAGE, "-c", code]
        return float(docker("run", *killer).stdout)

    def execute(self, service: str, *command: str, index: int = 1) -> subprocess.CompletedProcess[str]:
        """Run a command in a container that runs, as its user."""
        return docker("exec", self.container(service, index), *command, check=False)

    def remove(self) -> None:
        """Containers, networks and volumes; what was built stays for who made the images."""
        self.compose("--profile=*", "down", "--volumes", "--timeout=5", check=False, timeout_s=180)


def wait_until(is_so: Callable[[], bool], seconds: float, what: str, poll_s: float = 0.25) -> float:
    """Seconds until it was so. AssertionError when it was not in time."""
    begin = time.monotonic()
    while not is_so():
        assert time.monotonic() - begin < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(poll_s)
    return time.monotonic() - begin


@contextlib.contextmanager
def removed_after(project: ComposeProject) -> Iterator[ComposeProject]:
    """The project, and nothing of it afterwards."""
    try:
        yield project
    finally:
        project.remove()
