"""Runs a job in a container, through the Docker SDK: read-only, without privileges, without network unless
the source comes from the hub. Knows nothing of what the lines say.

A container outlives a service that is killed. Its labels say whose it is, so the next service ends it before
the job goes on from its last finished block; fencing keeps it from publishing meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from docker.errors import DockerException, NotFound
from docker.types import DeviceRequest, LogConfig

import docker
from services.quantizer.jobs.runner import MAX_LINE_CHARS, Ended, StartFailed, Task
from services.quantizer.jobs.spec import Places
from weft import logs
from weft.config import flags_of

# Where a container finds what the service calls by other names.
CONTAINER_PLACES = Places(
    Path("/sources"), Path("/artifacts"), Path("/calibration"), hub_cache=Path("/hub-cache")
)
LABEL_STATE, LABEL_JOB, LABEL_TOKEN = "weft.state", "weft.job", "weft.token"
# Streams of logs are silent while a block is worked on; the client takes longer silence for a dead engine.
_TIMEOUT_S = 120
_RETRY_S = 1.0
_MAX_OUTPUT_LINES = 64
_LOGGER = logs.get_logger("jobs")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DockerSettings:
    """`volumes` maps what the engine knows (a path of its machine, or a volume) to (place, "ro" or "rw")."""

    image: str
    volumes: dict[str, tuple[Path, str]]
    state_id: str
    memory: str | None = None
    user: str = "10001:10001"
    pids: int = 4096


def connect() -> Any:
    """A client of the engine that the environment names. Raises StartFailed when none answers."""
    try:
        client = docker.from_env(timeout=_TIMEOUT_S)
        client.ping()
    except DockerException as error:
        raise StartFailed(f"no docker engine: {' '.join(str(error).split())[:300]}") from error
    return client


class DockerRunner:
    """One container per run. `grace_s` lies between SIGTERM and SIGKILL."""

    places = CONTAINER_PLACES

    def __init__(self, client: Any, settings: DockerSettings, grace_s: float, num_devices: int) -> None:
        self._client, self._settings = client, settings
        self._grace_s = round(grace_s)
        # A run holds one thread while it is followed, another while it is stopped.
        self._threads = ThreadPoolExecutor(2 * num_devices + 2, thread_name_prefix="jobs-docker")

    async def start(self, task: Task) -> DockerRun:
        """Begin. Raises StartFailed."""
        try:
            container = await self.in_thread(lambda: self._start(task))
        except (DockerException, OSError) as error:
            raise StartFailed(f"cannot start a container: {' '.join(str(error).split())[:300]}") from error
        return DockerRun(self, container, self._grace_s)

    async def remove_leftovers(self, is_live: Callable[[str, int], bool]) -> None:
        """End and remove the containers of services that are gone."""
        with contextlib.suppress(DockerException, OSError):
            await self.in_thread(lambda: self._remove_leftovers(is_live))

    async def close(self) -> None:
        """Close the connection."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The SDK waits; the event loop must not."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _start(self, task: Task) -> Any:
        settings = self._settings
        kind, _, number = task.device.partition(":")
        options = dict(task.options)
        if kind == "cuda":
            options["device"] = "cuda:0"  # the only one that the container is given
        container = self._client.containers.create(
            settings.image,
            ["run", *flags_of(options), f"--fencing-token={task.token}"],
            name=f"weft-{task.job_id}-{task.token}",
            labels={
                LABEL_STATE: settings.state_id,
                LABEL_JOB: task.job_id,
                LABEL_TOKEN: str(task.token),
            },
            volumes={
                source: {"bind": str(place), "mode": mode}
                for source, (place, mode) in settings.volumes.items()
            },
            device_requests=(
                [DeviceRequest(device_ids=[number], capabilities=[["gpu"]])] if kind == "cuda" else None
            ),
            environment={"HF_HUB_OFFLINE": "0" if task.needs_network else "1"},
            network_mode="bridge" if task.needs_network else "none",
            mem_limit=settings.memory,
            memswap_limit=settings.memory,
            pids_limit=settings.pids,
            user=settings.user,
            read_only=True,
            tmpfs={"/tmp": "mode=1777"},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            init=True,
            log_config=LogConfig(type="json-file", config={"max-size": "10m", "max-file": "3"}),
        )
        try:
            container.start()
        except BaseException:
            with contextlib.suppress(DockerException):
                container.remove(force=True)
            raise
        return container

    def _remove_leftovers(self, is_live: Callable[[str, int], bool]) -> None:
        label = f"{LABEL_STATE}={self._settings.state_id}"
        for container in self._client.containers.list(all=True, filters={"label": label}):
            job_id, token = container.labels.get(LABEL_JOB, ""), container.labels.get(LABEL_TOKEN, "")
            if token.isdigit() and is_live(job_id, int(token)):
                continue
            _LOGGER.warning("ending a container of a service that is gone", job=job_id, token=token)
            with contextlib.suppress(DockerException):
                container.stop(timeout=self._grace_s)
            with contextlib.suppress(DockerException):
                container.remove(force=True)


class DockerRun:
    """A container at work."""

    def __init__(self, runner: DockerRunner, container: Any, grace_s: int) -> None:
        self._runner, self._container, self._grace_s = runner, container, grace_s

    async def lines(self) -> AsyncIterator[str]:
        """Its standard error, line by line; a stream that breaks off is taken up again while it runs."""
        since: int | None = None
        while True:
            try:
                chunks = await self._runner.in_thread(lambda since=since: self._stream(since))  # type: ignore[misc]
                async for line in self._lines_of(chunks):
                    since = int(time.time())  # the engine stamps lines with the wall clock
                    yield line
            except Exception as error:  # silence of _TIMEOUT_S too
                _LOGGER.info("log stream taken up again", reason=type(error).__name__)
            if not await self._is_running():
                return
            await asyncio.sleep(_RETRY_S)

    async def wait(self) -> Ended:
        """Its end; the container is removed."""
        while True:
            try:
                return await self._runner.in_thread(self._end)
            except NotFound:
                return Ended(137, "")  # removed by someone else
            except Exception as error:
                _LOGGER.warning("docker engine does not answer", reason=type(error).__name__)
                await asyncio.sleep(_RETRY_S)

    async def stop(self) -> None:
        """SIGTERM, and after the grace SIGKILL."""
        with contextlib.suppress(DockerException, OSError):
            await self._runner.in_thread(lambda: self._container.stop(timeout=self._grace_s))

    def _stream(self, since: int | None) -> Iterator[bytes]:
        found = self._container.logs(stream=True, follow=True, stdout=False, stderr=True, since=since)
        return iter(found)

    async def _lines_of(self, chunks: Iterator[bytes]) -> AsyncIterator[str]:
        pending = b""
        while (chunk := await self._runner.in_thread(lambda: next(chunks, None))) is not None:
            *whole, pending = (pending + chunk).split(b"\n")
            for line in whole:
                yield line.decode("utf-8", "replace")[:MAX_LINE_CHARS]
            pending = pending[: 4 * MAX_LINE_CHARS]
        if pending:
            yield pending.decode("utf-8", "replace")[:MAX_LINE_CHARS]

    async def _is_running(self) -> bool:
        def ask() -> bool:
            self._container.reload()
            return str(self._container.status) in ("created", "running", "restarting", "paused")

        try:
            return await self._runner.in_thread(ask)
        except NotFound:
            return False
        except Exception:
            return True  # the engine does not answer: nothing is known to have ended

    def _end(self) -> Ended:
        code = int(self._container.wait()["StatusCode"])
        output = self._container.logs(stdout=True, stderr=False, tail=_MAX_OUTPUT_LINES)
        with contextlib.suppress(DockerException):
            self._container.remove(force=True)
        return Ended(code, output.decode("utf-8", "replace").partition("\n")[0][:MAX_LINE_CHARS])
