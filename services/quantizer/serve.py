"""`python -m services.quantizer serve`: the job service. Wiring only; loads neither torch nor weights."""

# ruff: noqa: RUF009 - `option` makes a dataclass field

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.quantizer.config import ENV_PREFIX
from services.quantizer.jobs.clock import Clock
from services.quantizer.jobs.database import Database
from services.quantizer.jobs.job import DatabaseRefused
from services.quantizer.jobs.ownership import Ownership, StateRefused, check_state_directory
from services.quantizer.jobs.process_runner import ProcessRunner
from services.quantizer.jobs.runner import Runner, StartFailed
from services.quantizer.jobs.spec import Places, Rules
from services.quantizer.jobs.store import JobStore
from services.quantizer.jobs.supervisor import Supervisor
from services.quantizer.jobs.watchers import Watchers
from services.quantizer.rpc.servicer import SERVICE_NAME, QuantizerServicer
from weft import __version__, logs
from weft.config import REQUIRED, ConfigError, effective, load_config, option
from weft.rpc.address import Address, parse_address
from weft.rpc.auth import Authenticator
from weft.rpc.server import BindError, Server, serve
from weft.v1.quantizer_service_pb2_grpc import add_QuantizerServiceServicer_to_server

_LOGGER = logs.get_logger("quantizer")
_DEVICE = re.compile(r"cpu|cuda:\d{1,3}")
DATABASE_NAME = "jobs.sqlite"


def _devices(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for device in found:
        if not _DEVICE.fullmatch(device):
            raise ValueError(f"{device[:40]!r} is neither cpu nor cuda:N")
    if not found or len(set(found)) != len(found):
        raise ValueError("name each device once")
    return found


@dataclass(frozen=True)
class ServeConfig:
    """Flags of `serve`."""

    listen: Address = option(
        parse_address("127.0.0.1:50053"), "address to listen on", parse=parse_address, metavar="HOST:PORT"
    )
    api_key_file: Path | None = option(
        None, "file of hashed API keys; without it everybody may call", metavar="FILE"
    )
    sources: Path = option(REQUIRED, "what jobs may quantize lies below it", metavar="DIR")
    artifacts: Path = option(REQUIRED, "root of the artifact volume", metavar="DIR")
    state: Path = option(
        REQUIRED, "the jobs' database; on a disk of this machine, never on the artifact volume", metavar="DIR"
    )
    calibration_root: Path | None = option(
        None, "texts that jobs may name lie below it; without it they name none", metavar="DIR"
    )
    allow_hub: bool = option(False, "jobs may name repositories of the Hugging Face hub")
    hub_cache: Path | None = option(
        None, "where hub models are kept; by default the hub client's own place", metavar="DIR"
    )
    devices: tuple[str, ...] = option(
        ("cpu",), "one job at a time on each", parse=_devices, metavar="cpu|cuda:0,cuda:1"
    )
    runner: str = option(
        "process", "where a job runs: a child process or a container", choices=("process", "docker")
    )
    grace: float = option(20.0, "seconds between SIGTERM and SIGKILL of a run", metavar="SECONDS")
    max_queued: int = option(100, "jobs that may wait", metavar="N")
    max_kept: int = option(1000, "jobs that have ended and are remembered", metavar="N")
    max_watchers: int = option(1000, "WatchJob calls at once", metavar="N")
    docker_image: str = option(f"weft/quantizer:{__version__}", "image of --runner docker")
    docker_sources: str | None = option(
        None, "the sources as the docker engine knows them: path or volume; default --sources"
    )
    docker_artifacts: str | None = option(None, "the same for --artifacts")
    docker_calibration: str | None = option(None, "the same for --calibration-root")
    docker_hub_cache: str | None = option(None, "the same for --hub-cache")
    docker_memory: str | None = option(None, "memory limit of a container, as 32g", metavar="SIZE")
    docker_user: str = option("10001:10001", "user and group in a container", metavar="UID:GID")

    def __post_init__(self) -> None:
        for flag, value, least, most in (
            ("--grace", self.grace, 0.0, 3600.0),
            ("--max-queued", self.max_queued, 1, 100_000),
            ("--max-kept", self.max_kept, 1, 1_000_000),
            ("--max-watchers", self.max_watchers, 1, 100_000),
        ):
            if not least <= value <= most:
                raise ConfigError(flag, f"{value} is not between {least} and {most}")
        if self.allow_hub and self.runner == "docker" and self.hub_cache is None:
            # Its /tmp is memory, and gone with the container: every attempt would download again, into that.
            raise ConfigError("--hub-cache", "is required with --allow-hub and --runner docker")

    @property
    def places(self) -> Places:
        """The roots as absolute paths, links followed: a job must not depend on the directory of `serve`."""
        real = [
            None if path is None else Path(os.path.realpath(path))
            for path in (self.calibration_root, self.hub_cache)
        ]
        return Places(Path(os.path.realpath(self.sources)), Path(os.path.realpath(self.artifacts)), *real)


class QuantizerApplication:
    """What `weft.rpc.server.serve` runs."""

    service_names: Sequence[str] = (SERVICE_NAME,)

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._store: JobStore | None = None
        self._supervisor: Supervisor | None = None
        self._runner: Runner | None = None
        self._ownership: Ownership | None = None
        self._watchers = Watchers(config.max_watchers)

    async def load(self, server: Server) -> None:
        """Open the database, take over what was left, begin to work. Raises DatabaseRefused, OSError."""
        config, clock = self._config, Clock()
        self._ownership = Ownership(config.state)
        self._store = JobStore(config.state / DATABASE_NAME, clock)
        await self._store.open()
        self._runner = await self._make_runner(self._store)
        rules = Rules(config.places, config.devices, config.allow_hub)
        self._supervisor = Supervisor(
            self._store, self._runner, rules, self._watchers, self._ownership, clock
        )
        await self._supervisor.start()
        servicer = QuantizerServicer(
            self._store,
            self._supervisor,
            self._watchers,
            rules,
            max_queued=config.max_queued,
            max_kept=config.max_kept,
        )
        add_QuantizerServiceServicer_to_server(servicer, server.grpc)

    async def _make_runner(self, store: JobStore) -> Runner:
        config = self._config
        if config.runner == "process":
            return ProcessRunner(config.places, config.grace)
        from services.quantizer.jobs import docker_runner  # the SDK is loaded where it is used

        state_id = await store.run(Database.state_id)
        settings = docker_runner.DockerSettings(
            config.docker_image, _volumes(config), state_id, config.docker_memory, config.docker_user
        )
        client = await asyncio.to_thread(docker_runner.connect)
        return docker_runner.DockerRunner(client, settings, config.grace, len(config.devices))

    async def drain(self) -> None:
        """Stop the runs, whose jobs go back to the queue, and send the watchers away."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        self._watchers.close()

    async def close(self) -> None:
        """Let the database and the lock go."""
        if self._supervisor is not None and not self._supervisor.is_stopping:
            await self._supervisor.stop()
        if self._runner is not None:
            await self._runner.close()
        if self._store is not None:
            await self._store.close()
        if self._ownership is not None:
            self._ownership.release()


def _volumes(config: ServeConfig) -> dict[str, tuple[Path, str]]:
    """What a container is given: as the engine calls it -> (where the run finds it, how)."""
    from services.quantizer.jobs.docker_runner import CONTAINER_PLACES

    ours, theirs = config.places, CONTAINER_PLACES
    table = (
        (config.docker_sources, ours.sources, theirs.sources, "ro"),
        (config.docker_artifacts, ours.artifacts, theirs.artifacts, "rw"),
        (config.docker_calibration, ours.calibration, theirs.calibration, "ro"),
        (config.docker_hub_cache, ours.hub_cache, theirs.hub_cache, "rw"),
    )
    return {
        name or str(own): (place, mode)
        for name, own, place, mode in table
        if own is not None and place is not None
    }


def _check_directories(config: ServeConfig) -> None:
    """Raise OSError or StateRefused when a root is none."""
    for path in (config.sources, config.artifacts, config.calibration_root, config.hub_cache):
        if path is not None and not path.is_dir():
            raise NotADirectoryError(f"{path}: no such directory")
    check_state_directory(config.state, config.artifacts)  # before it is made: what is refused leaves nothing
    config.state.mkdir(mode=0o700, parents=True, exist_ok=True)


def main(flags: Sequence[str], prog: str) -> int:
    """Serve until a signal. Exit status 0 after one, 1 when it cannot start, 2 on a bad flag (SystemExit)."""
    config = load_config(
        ServeConfig, flags, prog=prog, env_prefix=ENV_PREFIX, description="The job service over gRPC."
    )
    logs.start()
    _LOGGER.info("configuration", **effective(config))
    try:
        _check_directories(config)
        keys = Authenticator.from_file(config.api_key_file) if config.api_key_file else None
        application = QuantizerApplication(config)
        return asyncio.run(serve(application, config.listen, is_public=True, authenticator=keys))
    except (BindError, DatabaseRefused, StateRefused, StartFailed, OSError, ValueError) as error:
        _LOGGER.error("cannot start", reason=str(error) or type(error).__name__)
        return 1
    finally:
        logs.stop()
