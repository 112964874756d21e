"""A connection to a Ray cluster: a private one on this machine, made for one run, or one that is running.

The private one listens on the loopback alone, wants a token that only its processes know, reports nothing to
anybody, and ends with this process, however that ends. This module does not know what the workers do.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.quantizer.errors import QuantizerError
from services.quantizer.workers import WorkerPool
from weft.config import environment_with

_PREFIX = "weft-ray-"
_LOCK = "lock"
_MAX_DIRECTORY = 40  # Ray's sockets lie 60 characters below, and a socket's path holds 107
_CONNECT_TIMEOUT_S = 5.0
_TOKEN = secrets.token_hex(32)  # one per process: Ray keeps the first that it saw

_DRIVER = {
    # A driver whose head is gone is ended by Ray after a minute, with its own words and exit code.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
    # A call without a connection makes one to whatever cluster it finds.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connection. `description` is how the user called it; `head` the address to probe, if there is one."""

    description: str
    head: tuple[str, int] | None

    def is_head_alive(self) -> bool:
        """Whether something still listens where the head did."""
        if self.head is None:
            return bool(_ray().is_initialized())
        try:
            socket.create_connection(self.head, _CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True


@contextmanager
def open_ray_pool(workers: str, device: torch.device) -> Iterator[WorkerPool]:
    """The workers of a run, each with as many threads as this process. Raises QuantizerError."""
    kind, _, rest = workers.partition(":")
    threads = torch.get_num_threads()
    if kind == "local":
        num_workers = int(rest)
        num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        if device.type == "cuda" and num_workers > num_gpus:
            raise QuantizerError(f"--workers {workers}: this machine has {num_gpus} devices")
        connection = private_cluster(num_workers, threads, num_gpus)
    else:
        connection = running_cluster(workers if rest.startswith("//") else rest)
    with connection as cluster:
        from services.quantizer.ray_pool import RayPool  # imports ray, which reads its settings then

        pool = RayPool(cluster, threads, device)
        try:
            pool.start()
            yield pool
        finally:
            pool.close()


@contextmanager
def private_cluster(num_workers: int, threads: int, num_gpus: int) -> Iterator[Cluster]:
    """Ray on this machine, for this context."""
    with _private_directory() as directory:
        environment = {
            **_DRIVER,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(directory),
            # The name says otherwise, but without it a node's address is never the loopback.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Where this process found the package, there the workers find it.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        options = {
            "address": "local",
            "num_cpus": num_workers * threads,
            "num_gpus": num_gpus,
            "include_dashboard": False,
            "_temp_dir": str(directory),
        }
        with _connection(environment, options, f"local:{num_workers}") as cluster:
            yield cluster


@contextmanager
def running_cluster(address: str) -> Iterator[Cluster]:
    """A cluster that is running: "auto", HOST:PORT, or ray://HOST:PORT. Raises QuantizerError."""
    shown = address if address.startswith("ray://") else f"ray:{address}"
    with _connection(_DRIVER, {"address": address}, shown) as cluster:
        yield cluster


@contextmanager
def _connection(environment: dict[str, str], options: dict[str, Any], shown: str) -> Iterator[Cluster]:
    with environment_with(environment):
        records = logging.getLogRecordFactory()
        ray = _ray()
        handler = signal.getsignal(signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()
        try:
            try:
                quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
                context = ray.init(configure_logging=True, **quiet, **options)
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise QuantizerError(f"--workers {shown}: no connection to Ray: {reason}") from error
            finally:
                logging.setLogRecordFactory(records)  # Ray's marks every record of every logger
                if is_main:  # Ray has put its own in place, which would end this process without cleaning up
                    signal.signal(signal.SIGTERM, handler)
            # Ray writes notes on lost workers to stdout, which is the artifact's; the pool logs them itself.
            with contextlib.redirect_stdout(_Discard()):
                yield Cluster(shown, None if shown.startswith("ray://") else _head(context))
        finally:
            with contextlib.suppress(Exception):  # what is left of a lost cluster may refuse to say goodbye
                ray.shutdown()
            logging.setLogRecordFactory(records)
            if is_main:
                signal.signal(signal.SIGTERM, handler)


class _Discard(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def _head(context: Any) -> tuple[str, int]:
    host, _, port = context.address_info["gcs_address"].rpartition(":")
    return host.strip("[]"), int(port)


def _ray() -> Any:
    import ray

    return ray


@contextmanager
def _private_directory() -> Iterator[Path]:
    """For Ray's sockets and logs. Removes what killed runs of this user have left behind."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _MAX_DIRECTORY - len(_PREFIX):
        parent = Path("/tmp")
    for path in parent.glob(_PREFIX + "*"):
        _remove_abandoned(path)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with (directory / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    with contextlib.suppress(OSError):
        if directory.is_symlink() or directory.stat().st_uid != os.getuid():
            return
        with (directory / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
