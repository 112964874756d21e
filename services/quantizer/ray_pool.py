"""Tasks on Ray: one actor per worker, tasks handed out one at a time, and again when a worker is lost.

Why actors and not Ray's own task retries: a worker says what decides bits on its machine before it gets any
work, keeps its device and its imports for the whole run, and the loss of all of them is noticed instead of
waited for. This module does not know what a task computes, nor in which order tasks go and answers come.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
import torch

from services.quantizer.errors import QuantizerError
from services.quantizer.parcels import Span, as_array, as_tensor, pack, unpack
from services.quantizer.ray_cluster import Cluster
from services.quantizer.ray_worker import Answer, Facts, Worker, facts_here
from services.quantizer.task_queue import Job, TaskQueue
from services.quantizer.workers import Result, Task
from weft import logs

_LOGGER = logs.get_logger("quantizer")
_LARGE = 64 << 10  # bytes from which a buffer goes to the object store, once, instead of with every task
_START_TIMEOUT_S = 120.0
_OTHERS_TIMEOUT_S = 10.0
_REPLACEMENT_TIMEOUT_S = 60.0
_POLL_S = 1.0
_PROBE_EVERY_S = 3.0
_MAX_FAILED_PROBES = 3
_MAX_LOSSES_OF_TASK = 3
_MAX_FAILED_STARTS = 8


@dataclass(slots=True)
class _Member:
    """A worker. `reply` is what it is asked for when it starts."""

    actor: Any
    reply: Any
    name: str = "?"


@dataclass(slots=True)
class _Batch:
    """The state of one `stream`: `running` are the jobs at work, by what Ray will answer them under."""

    function: Callable[[Any], Any]
    queue: TaskQueue
    running: dict[Any, tuple[Job, _Member]] = field(default_factory=dict)


class _Store:
    """Spans that were put into the object store, once each, for as long as this lives."""

    def __init__(self) -> None:
        self._put: dict[tuple[Any, ...], tuple[Any, Span]] = {}

    def arguments(self, task: Any) -> list[Any]:
        """The parcel of a task, its spans as the bytes themselves, or references to where they are."""
        content, spans = pack(task)
        return [content, *(self._argument(span) for span in spans)]

    def _argument(self, span: Span) -> Any:
        if span.data.numel() < _LARGE:
            return as_array(span.data).copy()
        if span.key not in self._put:
            self._put[span.key] = ray.put(as_array(span.data)), span  # the span keeps its key taken
        return self._put[span.key][0]


class RayPool:
    """A WorkerPool over a cluster. Not for several threads."""

    def __init__(self, cluster: Cluster, threads: int, device: torch.device) -> None:
        self._cluster, self._threads, self._device = cluster, threads, device
        self._facts = facts_here(device)
        self._idle: deque[_Member] = deque()
        self._members: list[_Member] = []
        self._joining: dict[Any, _Member] = {}
        self._failed_starts, self._failed_probes = 0, 0
        self._last_probe = time.monotonic()
        self._alone_since: float | None = None
        self._is_started = False
        self.num_workers = 0

    def start(self) -> None:
        """Make the workers; wait for the first, and a moment more for the others: who is late joins later."""
        with _lost_connection(self._cluster):
            self.num_workers = self._count_slots()
            for _ in range(self.num_workers):
                self._invite()
            deadline = time.monotonic() + _START_TIMEOUT_S
            while self._joining and time.monotonic() < deadline:
                self._settle(None)
                if self._members:  # more may be on their way, or never come: their node is busy or just dead
                    deadline = min(deadline, time.monotonic() + _OTHERS_TIMEOUT_S)
            if not self._members:
                raise QuantizerError(
                    f"--workers {self._cluster.description}: no worker started in {_START_TIMEOUT_S:.0f} s"
                )
        self._is_started = True
        hosts = sorted({member.name for member in self._members})
        _LOGGER.info("workers", workers=len(self._members), threads=self._threads, hosts=hosts)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for member in [*self._members, *self._joining.values()]:
            _kill(member)
        self._members, self._joining = [], {}
        self._idle.clear()

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """See WorkerPool."""
        return list(self._run(function, iter(tasks), math.inf))

    def stream(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """See WorkerPool."""
        return self._run(function, iter(tasks), self.num_workers)

    def _run(self, function: Callable[[Any], Any], tasks: Iterator[Any], limit: float) -> Iterator[Any]:
        # Tasks of one batch share what is large; a stream would keep all that ever passed.
        arguments = _Store().arguments if math.isinf(limit) else lambda task: _Store().arguments(task)
        batch = _Batch(function, TaskQueue(tasks, arguments, limit))
        try:
            while True:
                while self._idle and self._hand_out(batch):
                    pass
                if batch.queue.has_answer:
                    yield self._open(batch.queue.take_answer())
                elif batch.queue.is_done:
                    return
                else:
                    with _lost_connection(self._cluster):
                        self._settle(batch)
        finally:
            # Left in the middle: the next task of these waits until the one that nobody wants is done.
            self._idle.extend(member for _, member in batch.running.values())

    def _hand_out(self, batch: _Batch) -> bool:
        """The next job to a worker that is idle; False if there is none for now."""
        job = batch.queue.next_job()
        if job is None:
            return False
        member = self._idle.popleft()
        with _lost_connection(self._cluster):
            batch.running[member.actor.run.remote(batch.function, *job.arguments)] = job, member
        return True

    def _settle(self, batch: _Batch | None) -> None:
        """Wait a moment for something to end, and act on it."""
        running = {} if batch is None else batch.running
        refs = [*running, *self._joining]
        done = ray.wait(refs, num_returns=1, timeout=_POLL_S)[0] if refs else time.sleep(_POLL_S) or []
        for ref in done:
            if ref in self._joining:
                self._admit(ref)
            elif batch is not None:
                self._collect(batch, ref)
        self._check_alive()

    def _collect(self, batch: _Batch, ref: Any) -> None:
        job, member = batch.running.pop(ref)
        try:
            batch.queue.answer(job, ray.get(ref))
        except ray.exceptions.RayTaskError as error:  # not the function's: those come as answers
            raise QuantizerError(f"worker on {member.name}: {_line(error.cause or error)}") from error
        except ray.exceptions.RayError as error:
            batch.queue.lose(job)
            self._lose(member, _line(error))
            if job.num_losses >= _MAX_LOSSES_OF_TASK:
                raise QuantizerError(
                    f"a task was lost with its worker {job.num_losses} times, the last on {member.name} "
                    f"(memory?): {_line(error)}"
                ) from error
        else:
            self._idle.append(member)

    def _open(self, answer: Answer) -> Any:
        if answer.error is not None:
            raise answer.error
        # Copies: what lies in the object store is not writable and leaves with the answer.
        buffers = [as_tensor(array).clone() for array in answer.buffers]
        return unpack(answer.content, buffers, self._device)

    def _count_slots(self) -> int:
        need, what = (1, "GPU") if self._device.type == "cuda" else (self._threads, "CPU")
        found = [int(node["Resources"].get(what, 0) // need) for node in ray.nodes() if node["Alive"]]
        if not sum(found):
            raise QuantizerError(
                f"--workers {self._cluster.description}: no node has {need} {what} for a worker"
                + (" (--threads says how many)" if what == "CPU" else "")
            )
        return sum(found)

    def _invite(self) -> None:
        is_gpu = self._device.type == "cuda"
        threads = str(self._threads)
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=0 if is_gpu else self._threads,
                num_gpus=1 if is_gpu else 0,
                max_restarts=0,
                runtime_env={"env_vars": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": threads}},
            )
            .remote(self._threads, self._device.type)
        )
        member = _Member(actor, actor.facts.remote())
        self._joining[member.reply] = member

    def _admit(self, ref: Any) -> None:
        member = self._joining.pop(ref)
        try:
            member.name, process, facts = ray.get(ref)
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            _kill(member)
            # What its constructor raises it would raise again; a node may just have died.
            if self._failed_starts >= _MAX_FAILED_STARTS or not _may_start_elsewhere(error):
                raise QuantizerError(
                    f"--workers {self._cluster.description}: a worker does not start: {_line(error)}"
                ) from error
            self._invite()
            return
        self._check_facts(member.name, facts)
        self._failed_starts = 0
        self._members.append(member)
        self._idle.append(member)
        _LOGGER.debug("worker", host=member.name, pid=process)

    def _check_facts(self, name: str, facts: Facts) -> None:
        for key in Facts.__dataclass_fields__:
            here, there = getattr(self._facts, key), getattr(facts, key)
            if here != there:
                raise QuantizerError(
                    f"worker on {name}: {key.replace('_', ' ')} is {there}, here it is {here}; "
                    "its results would not be the same"
                )

    def _lose(self, member: _Member, reason: str) -> None:
        """Go on without a worker; another one takes its place when there is room for it."""
        _kill(member)
        if member in self._members:
            self._members.remove(member)
            _LOGGER.warning("a worker is lost", host=member.name, left=len(self._members), reason=reason)
            self._invite()

    def _check_alive(self) -> None:
        now = time.monotonic()
        if now - self._last_probe >= _PROBE_EVERY_S:
            self._last_probe = now
            self._failed_probes = 0 if self._cluster.is_head_alive() else self._failed_probes + 1
            if self._failed_probes >= _MAX_FAILED_PROBES:
                raise _lost(self._cluster)
        if self._members:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif self._is_started and now - self._alone_since > _REPLACEMENT_TIMEOUT_S:
            raise QuantizerError(f"--workers {self._cluster.description}: all workers are lost")


def _may_start_elsewhere(error: Exception) -> bool:
    return isinstance(error, ray.exceptions.RayActorError) and not error.actor_init_failed


def _kill(member: _Member) -> None:
    if not ray.is_initialized():
        return
    try:
        ray.kill(member.actor)
    except Exception:
        _LOGGER.debug("worker is gone already", host=member.name)


@contextmanager
def _lost_connection(cluster: Cluster) -> Iterator[None]:
    """What a gone connection comes to; the Ray client says by an error of its own that its server is gone."""
    if not ray.is_initialized():  # a call would make a connection to whatever cluster it finds
        raise _lost(cluster)
    try:
        yield
    except ConnectionError as error:
        raise _lost(cluster) from error


def _lost(cluster: Cluster) -> QuantizerError:
    return QuantizerError(f"--workers {cluster.description}: the connection to the head of Ray is lost")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
