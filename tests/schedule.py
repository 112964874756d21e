"""Which test file runs when and in which worker process, for `make test`: one file is one piece of work.

Some folders wait more than they compute: they start processes, and let real time-outs pass. The first worker
takes their files first and the others take them last, so that one worker waits while the others use the
cores. Files of the slowest folders go first, so that none of them is begun when all else is done.

Knows nothing of what is tested. Without `-n` pytest never asks for it.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# Folders whose tests wait, the longest files first.
WAITING = (
    "tests/e2e/",
    "tests/faults/",
    "tests/services/gateway/",
    "tests/hostile/",
    "tests/clients/",
    "tests/tools/",
    "tests/weft/rpc/",
    "tests/cli/",
)
# Folders whose tests compute, the longest files first; what is in neither list comes last.
COMPUTING = (
    "tests/services/engine/kernels/gpu/",
    "tests/services/quantizer/",
    "tests/services/engine/runner/",
    "tests/services/engine/models/",
    "tests/services/engine/",
)
# Folders whose stack is shared by a session and costs a quantization: one worker runs them whole.
ONE_PIECE = ("tests/e2e/",)
MAX_WORKERS = 8


def num_workers(num_cores: int) -> int:
    """One more than there are cores, for one of them waits; but each takes up to 2 GB."""
    return min(num_cores + 1, MAX_WORKERS)


def piece_of(nodeid: str) -> str:
    """The piece of work that a test belongs to: its file, or its folder."""
    path = nodeid.split("::", 1)[0]
    return next((folder for folder in ONE_PIECE if path.startswith(folder)), path)


def rank(piece: str, takes_waiting: bool) -> tuple[bool, int, str]:
    """Orders pieces of work, the first to begin first, for a worker that takes what waits, or does not."""
    waits = piece.startswith(WAITING)
    folders = WAITING if waits else COMPUTING
    place = next((i for i, folder in enumerate(folders) if piece.startswith(folder)), len(folders))
    return (waits != takes_waiting, place, piece)


class ScheduleByFile(LoadScopeScheduling):
    """Hands out pieces of work in the order of `rank`."""

    @property
    def is_complete(self) -> bool:
        """Whether every test was run. Workers that crash too often leave some, and nobody is told."""
        return self.collection is not None and not self.has_pending

    def _split_scope(self, nodeid: str) -> str:
        return piece_of(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        takes_waiting = node.gateway.id == "gw0"
        first = min(self.workqueue, key=lambda piece: rank(piece, takes_waiting))
        self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)
