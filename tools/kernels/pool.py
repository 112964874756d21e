"""Compiles many cases in worker processes, and outlives a compiler that takes its process down.

The compiler says why on the process's own stderr, with pages of its internal code: each job's is kept in a
file while it runs, and a few lines of it go into the error. Knows processes; what a job does is
`machine_code`'s.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from tools.kernels.cases import Entry
from tools.kernels.machine_code import Facts, read_case

Job = tuple[int, int]
"""(place of the entry, architecture)."""
_TELLING = re.compile(r"error|illegal|assert|unsupported|out of", re.IGNORECASE)

_entries: list[Entry] = []
"""What the workers compile: they are forks, and a kernel cannot be sent to another process."""


@dataclass(frozen=True, slots=True)
class _Setting:
    cache: Path
    listing: Path | None
    said: Path

    def file(self, job: Job) -> Path:
        """Where the compiler's words on a job are while it runs."""
        return self.said / f"{job[0]}-{job[1]}"


def compile_all(
    entries: list[Entry], jobs: list[Job], num_processes: int, cache: Path, listing: Path | None
) -> dict[Job, Facts]:
    """Facts of all jobs; for one that takes its process down, an error."""
    _entries[:] = entries
    done: dict[Job, Facts] = {}
    with tempfile.TemporaryDirectory() as folder:
        setting = _Setting(cache, listing, Path(folder))
        while pending := [job for job in jobs if job not in done]:
            done |= _run_together(pending, num_processes, setting)
            # A pool that broke leaves the files of what it was at; each is tried once more, alone.
            for job in [job for job in pending if job not in done and setting.file(job).exists()]:
                crash = _error(job, "the compiler crashed", setting)
                done |= {job: crash} | _run_together([job], 1, setting)
    return done


def _run_together(jobs: list[Job], num_processes: int, setting: _Setting) -> dict[Job, Facts]:
    """Facts of the jobs that ended before the pool broke, if it did."""
    done: dict[Job, Facts] = {}
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(_work, job, setting): job for job in jobs}
        for future in as_completed(futures):
            # A broken pool fails all of its futures; those that had ended keep their results.
            with contextlib.suppress(BrokenProcessPool):
                done[futures[future]] = future.result()
    return done


def _work(job: Job, setting: _Setting) -> Facts:
    file = setting.file(job)
    with _stderr_to(file):
        facts = read_case(_entries[job[0]].case, job[1], setting.cache, setting.listing)
    if facts.error:
        facts = _error(job, facts.error, setting)
    file.unlink()
    return facts


@contextlib.contextmanager
def _stderr_to(file: Path) -> Iterator[None]:
    """Send this process's stderr, C++ code's included, to a file."""
    before = os.dup(2)
    with file.open("wb") as target:
        os.dup2(target.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def _error(job: Job, error: str, setting: _Setting) -> Facts:
    """Facts of a case without machine code, with the telling lines of what the compiler said."""
    said = setting.file(job).read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line.strip()[:200] for line in said if _TELLING.search(line) and not line.startswith(" ")]
    facts = Facts(_entries[job[0]].case.name, job[1])
    return replace(facts, error="; ".join([error, *dict.fromkeys(telling[:4])]))
