"""A Ray cluster of two nodes on this machine: the bytes of one process, also when workers are lost.

The cluster of the tests lives in the environment of this process; private ones are started by runs of their
own, because Ray reads its settings once.
"""

import dataclasses
import gc
import importlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from services.quantizer import job as job_module
from services.quantizer.config import QuantizerConfig
from services.quantizer.errors import QuantizerError
from services.quantizer.job import run
from services.quantizer.ray_cluster import Cluster, open_ray_pool
from services.quantizer.ray_worker import facts_here
from services.quantizer.workers import SerialPool

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
STORE = 80 << 20

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.skipif(
        not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free < 4 * STORE,
        reason="/dev/shm is too small",
    ),
    pytest.mark.timeout(280),
]


class TwoNodes:
    """A head that works on nothing, and nodes of one core each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = []
        self.complete()

    @property
    def workers(self):
        return f"ray:{self.cluster.address}"

    def complete(self):
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE))

    def kill(self):
        """A whole node, without a word."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)


@pytest.fixture(scope="module")
def settings():
    """For everything that Ray starts. A path under pytest's directory is too long for Ray's sockets."""
    directory = tempfile.mkdtemp(prefix="weft-test-ray-", dir="/tmp")
    values = {
        "RAY_TMPDIR": directory,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        patch.syspath_prepend(str(Path(__file__).parent))
        yield
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def two_nodes(settings):
    before = set(psutil.Process().children(recursive=True))
    made = TwoNodes()
    yield made
    made.cluster.shutdown()
    left = set(psutil.Process().children(recursive=True)) - before
    assert psutil.wait_procs(left, timeout=20)[1] == []


@pytest.fixture
def quick(tmp_path):
    """quick(source, artifacts, **changes) -> the configuration of a run of seconds."""

    def configure(source, artifacts, **changes):
        values = {
            "samples": 4,
            "sequence_length": 64,
            "evaluation_tokens": 512,
            "group_size": 32,
            "threads": 1,
        }
        return QuantizerConfig(
            source=source, artifacts=tmp_path / artifacts, name="tiny", **{**values, **changes}
        )

    return configure


class TestPool:
    """The workers themselves."""

    @pytest.fixture(scope="class")
    @classmethod
    def pool(cls, two_nodes):
        torch.set_num_threads(1)
        with open_ray_pool(two_nodes.workers, CPU) as pool:
            assert pool.num_workers == 2
            yield pool

    @pytest.fixture
    def tasks(self, settings):
        return importlib.import_module("ray_tasks")

    def test_results_are_those_of_one_process_and_in_order(self, pool, tasks):
        torch.manual_seed(0)
        gram = torch.randn(256, 256)  # large: goes to the object store
        products = [tasks.Product(torch.randn(7, 256), gram.T if n % 2 else gram, n) for n in range(9)]
        remote, here = pool.map(tasks.multiply, products), SerialPool().map(tasks.multiply, products)
        assert [r["number"] for r in remote] == list(range(9))
        assert all(torch.equal(r["out"], h["out"]) for r, h in zip(remote, here, strict=True))
        assert len({r["process"] for r in remote} - {os.getpid()}) == 2
        remote[0]["out"].zero_()  # what comes back is the caller's own

    def test_errors_are_those_that_were_raised_the_first_in_order_first(self, pool, tasks):
        with pytest.raises(QuantizerError, match=r"^tensor two: no$"):
            pool.map(tasks.refuse, [1, 2, 3])
        with pytest.raises(ValueError, match=r"^three$"):
            pool.map(tasks.refuse, [1, 3])
        with pytest.raises(QuantizerError, match=r"TwoWords: not copied$"):
            pool.map(tasks.refuse_oddly, [0])
        assert pool.map(tasks.refuse, [0, 1]) == [0, 1]

    def test_task_that_writes_to_shared_memory_is_told(self, pool, tasks):
        with pytest.raises(RuntimeError, match="write writes to the tensors of its task"):
            pool.map(tasks.write, [tasks.Product(torch.ones(1), torch.ones(256, 256), 0)])

    def test_stream_has_no_more_on_its_way_than_workers(self, pool, tasks):
        taken = []

        def endless():
            while True:
                taken.append(len(taken))
                yield len(taken) - 1 if len(taken) < 3 else 4

        stream = pool.stream(tasks.refuse, endless())
        assert next(stream) == 0
        assert len(taken) <= 2
        assert next(stream) == 1
        assert len(taken) <= 3
        stream.close()
        assert pool.map(tasks.refuse, [0, 1]) == [0, 1]

    def test_stream_keeps_nothing_of_what_has_passed(self, pool, tasks):
        alive = []

        def products():
            for number in range(8):
                array = np.ones((256, 256), np.float32)  # large: goes to the object store
                alive.append(weakref.ref(array))
                yield tasks.Product(torch.ones(1, 256), torch.from_numpy(array), number)

        for given, _ in enumerate(pool.stream(tasks.multiply, products()), 1):
            gc.collect()
            assert sum(array() is not None for array in alive) <= len(alive) - given + 1

    def test_worker_that_is_killed_loses_no_work(self, pool, tasks, tmp_path):
        numbers = [(n, str(tmp_path / "died")) for n in range(6)]
        assert pool.map(tasks.die_once, numbers) == [n * n for n in range(6)]
        assert (tmp_path / "died").exists()

    @pytest.mark.slow
    def test_task_that_kills_every_worker_ends_the_run(self, pool, tasks):
        with pytest.raises(QuantizerError, match="lost with its worker 3 times"):
            pool.map(tasks.die, [0])


class TestRuns:
    """Artifacts, whole."""

    @pytest.mark.parametrize("propagate_error", [False, True], ids=["across blocks", "inside a block"])
    def test_node_that_is_killed_in_the_middle_changes_no_byte(
        self, two_nodes, make_checkpoint, quick, monkeypatch, propagate_error
    ):
        two_nodes.complete()
        source = make_checkpoint("Qwen2", num_hidden_layers=3)
        alone = run(quick(source, "alone", propagate_error=propagate_error))
        quantize_block, blocks = job_module._quantize_block, []

        def kill_after_the_first(job, index, *others):
            quantize_block(job, index, *others)
            blocks.append(index)
            if len(blocks) == 1:
                two_nodes.kill()

        monkeypatch.setattr(job_module, "_quantize_block", kill_after_the_first)
        config = quick(source, "many", propagate_error=propagate_error, workers=two_nodes.workers)
        many = run(config)
        assert blocks == [0, 1, 2]
        assert len(two_nodes.nodes) == 1
        assert many.manifest.digest == alone.manifest.digest

    @pytest.mark.slow
    def test_worker_that_computes_otherwise_is_refused_by_name(self, two_nodes, monkeypatch):
        from services.quantizer import ray_pool

        two_nodes.complete()
        torch.set_num_threads(1)
        facts = dataclasses.replace(facts_here(CPU), torch="1.0")
        monkeypatch.setattr(ray_pool, "facts_here", lambda device: facts)
        with pytest.raises(
            QuantizerError, match=rf"worker on {os.uname().nodename}: torch is .*, here it is 1"
        ):
            with open_ray_pool(two_nodes.workers, CPU):
                pass

    def test_what_decides_bits_is_compared(self, settings):
        from services.quantizer.ray_pool import RayPool

        pool = RayPool(Cluster("ray:auto", None), 1, CPU)
        facts = facts_here(CPU)
        pool._check_facts("one", facts)
        for key, value in {"cpu_capability": "AVX2", "threads": 99, "torch": "1.0", "code": "0"}.items():
            with pytest.raises(QuantizerError, match=rf"^worker on two: {key.replace('_', ' ')} is {value}"):
                pool._check_facts("two", dataclasses.replace(facts, **{key: value}))

    def test_more_threads_than_any_node_has(self, two_nodes):
        torch.set_num_threads(2)
        with pytest.raises(QuantizerError, match=r"no node has 2 CPU .*--threads"):
            with open_ray_pool(two_nodes.workers, CPU):
                pass

    @pytest.mark.slow
    def test_all_workers_lost_is_one_line(self, two_nodes, settings, monkeypatch):
        from services.quantizer import ray_pool

        tasks = importlib.import_module("ray_tasks")
        monkeypatch.setattr(ray_pool, "_REPLACEMENT_TIMEOUT_S", 3.0)
        two_nodes.complete()
        with open_ray_pool(two_nodes.workers, CPU) as pool:
            assert pool.map(tasks.refuse, [0]) == [0]
            two_nodes.kill()
            two_nodes.kill()
            with pytest.raises(QuantizerError, match="all workers are lost"):
                pool.map(tasks.refuse, [0, 1])


class TestPrivate:
    """`local:N`, as commands of their own."""

    @pytest.fixture
    def start(self, tmp_path):
        """start(source, *flags) -> the process; whatever it leaves running fails the test."""
        started = []

        def start(source, *flags):
            values = {
                "source": source, "artifacts": tmp_path / "artifacts", "name": "tiny", "samples": 4,
                "sequence-length": 64, "evaluation-tokens": 512, "group-size": 32, "threads": 1,
            }  # fmt: skip
            words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
            process = subprocess.Popen(
                [sys.executable, "-m", "services.quantizer", "run", *words, *flags],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
            return process

        yield start
        for process in started:
            process.kill()
            process.communicate()

    @staticmethod
    def ray_directories():
        return set(Path(tempfile.gettempdir()).glob("weft-ray-*"))

    @staticmethod
    def wait_for_workers(process):
        """Its children, once the workers have come and the first block is done."""
        for line in process.stderr:
            if '"progress"' in line:
                return psutil.Process(process.pid).children(recursive=True)
        raise AssertionError("the run ended early")

    @pytest.mark.slow
    def test_whole_run_listens_on_the_loopback_and_leaves_nothing(self, start, make_checkpoint, quick):
        source = make_checkpoint("Llama", num_hidden_layers=2)
        before = self.ray_directories()
        process = start(source, "--workers", "local:2", "--no-propagate-error")
        children = self.wait_for_workers(process)
        addresses = {
            connection.laddr.ip
            for child in children
            for connection in child.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert addresses
        assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert psutil.wait_procs(children, timeout=20)[1] == []
        assert self.ray_directories() <= before
        alone = run(quick(source, "alone", propagate_error=False))
        assert Path(out.splitlines()[0]).name == alone.version
        assert "_ray_timestamp_ns" not in err

    @pytest.mark.slow
    @pytest.mark.timeout(500)
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    def test_run_that_is_ended_takes_its_workers_along(self, start, make_checkpoint, number):
        source = make_checkpoint("Llama", num_hidden_layers=12)
        before = self.ray_directories()
        process = start(source, "--workers", "local:2")
        children = self.wait_for_workers(process)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        # The kernel ends the workers with their parent; Ray's own agents try to tell a head that is gone.
        assert psutil.wait_procs(children, timeout=280)[1] == []
        if number == signal.SIGKILL:  # the next one sweeps up
            assert len(self.ray_directories() - before) == 1
            process = start(source, "--workers", "local:1")
            self.wait_for_workers(process)
            process.terminate()
            process.communicate(timeout=60)
        assert self.ray_directories() <= before
