"""What a run needs, said and held against what there is."""

import json

import pytest
import torch

from services.quantizer import host_memory
from services.quantizer.__main__ import main
from services.quantizer.estimate import Workload, estimate

MIB = 1 << 20


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def machine(tmp_path):
    """A kernel that says: 8 GiB available, 100 MiB used, 150 MiB at most."""
    write(tmp_path, "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    write(tmp_path, "proc/self/status", "Name: python\nVmHWM:\t 153600 kB\nVmRSS:\t 102400 kB\n")
    return tmp_path


def test_the_kernel_is_believed(machine):
    assert host_memory.used_bytes(machine) == 100 * MIB
    assert host_memory.peak_bytes(machine) == 150 * MIB
    assert host_memory.available_bytes(machine) == 8192 * MIB
    assert host_memory.available_bytes(machine / "nowhere") is None
    assert host_memory.used_bytes() > 10 * MIB
    assert host_memory.available_bytes() > 0


def test_the_narrowest_control_group_counts_and_cached_files_do_not(machine):
    write(machine, "proc/self/cgroup", "0::/outer/inner\n")
    group = "sys/fs/cgroup/outer"
    write(machine, f"{group}/inner/memory.max", "max\n")
    write(machine, f"{group}/inner/memory.current", f"{500 * MIB}\n")
    assert host_memory.available_bytes(machine) == 8192 * MIB
    write(machine, f"{group}/memory.max", f"{1000 * MIB}\n")
    write(machine, f"{group}/memory.current", f"{900 * MIB}\n")
    assert host_memory.available_bytes(machine) == 100 * MIB
    write(machine, f"{group}/memory.stat", f"anon 5\ninactive_file {300 * MIB}\n")
    assert host_memory.available_bytes(machine) == 400 * MIB


def test_inside_of_a_container_the_root_is_the_group(machine):
    write(machine, "proc/self/cgroup", "0::/\n")
    write(machine, "sys/fs/cgroup/memory.max", f"{64 * MIB}\n")
    write(machine, "sys/fs/cgroup/memory.current", f"{80 * MIB}\n")
    assert host_memory.available_bytes(machine) == 0


def test_control_groups_of_version_1(machine):
    write(machine, "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n")
    group = "sys/fs/cgroup/memory/a"
    write(machine, f"{group}/memory.limit_in_bytes", f"{300 * MIB}\n")
    write(machine, f"{group}/memory.usage_in_bytes", f"{100 * MIB}\n")
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(machine, "sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n")
    assert host_memory.available_bytes(machine) == 200 * MIB


def workload(**changes):
    values = {
        "groups": ((256, (256, 256)), (256, (512,)), (512, (256,))),
        "block_parameters": 400_000,
        "hidden_size": 256,
        "vocab_size": 1000,
        "outer_bytes": 512_000,
        "calibration_tokens": 4096,
        "sequence_length": 512,
        "evaluation_tokens": 2048,
        "has_exact": True,
    }
    return Workload(**{**values, **changes})


@pytest.mark.parametrize(
    "larger",
    [
        {"calibration_tokens": 1 << 20},
        {"evaluation_tokens": 1 << 20},
        {"block_parameters": 10**9},
        {"outer_bytes": 1 << 32},
        {"vocab_size": 1 << 24},
        {"groups": ((1 << 14, (1 << 16,)),)},
        {"groups": ((1 << 15, (8,)),)},
    ],
)
def test_everything_that_grows_is_in_the_sum(larger):
    before = estimate(workload(), 100 * MIB, has_device=False).host_bytes
    assert estimate(workload(**larger), 100 * MIB, has_device=False).host_bytes > 2 * before


def test_streams_are_exact_and_the_device_takes_the_blocks():
    found = estimate(workload(), 7, has_device=False)
    assert found.host["streams"] == 4 * 256 * (2 * 4096 + 3 * 2048 + 4 * 48)
    alone = estimate(workload(has_exact=False), 7, has_device=False)
    assert alone.host["streams"] == 4 * 256 * (4096 + 3 * 2048 + 4 * 48)
    ahead = estimate(workload(has_exact=False, is_ahead=True), 7, has_device=False)
    assert ahead.host["streams"] == found.host["streams"]
    assert found.host["interpreter and libraries"] == 7
    assert found.device_bytes == 0
    large = workload(block_parameters=10**8)
    apart = estimate(large, 7, has_device=True)
    assert apart.device["a block in fp32"] == 4 * 10**8
    assert apart.host_bytes < estimate(large, 7, has_device=False).host_bytes
    with_workers = estimate(large, 7, has_device=False, num_local_workers=2).host_bytes
    assert with_workers > estimate(large, 7, has_device=False).host_bytes + 8 * 10**8


@pytest.fixture
def attempt(make_checkpoint, tmp_path, capfd):
    """attempt(*flags) -> (status, lines on standard error)."""
    source = make_checkpoint(num_hidden_layers=1)

    def run(*flags):
        base = ["run", "--source", str(source), "--artifacts", str(tmp_path / "a"), "--name", "tiny"]
        quick = ["--samples", "2", "--sequence-length", "64", "--evaluation-tokens", "128"]
        status = main([*base, *quick, "--group-size", "32", "--threads", "1", *flags])
        return status, capfd.readouterr().err.splitlines()

    return run


def test_a_job_that_cannot_fit_is_refused_with_figures(attempt, tmp_path):
    status, lines = attempt("--memory-limit", "64MiB")
    assert status == 1
    assert lines[-1].startswith("error: memory: ")
    assert "64 MiB available; the largest parts: interpreter and libraries" in lines[-1]
    assert "--samples, --sequence-length or --evaluation-tokens" in lines[-1]
    assert not list((tmp_path / "a" / "tiny").iterdir())


def test_the_plan_comes_before_the_work(attempt):
    status, lines = attempt("--memory-limit", "64GiB")
    assert status == 0
    events = [json.loads(line) for line in lines if line.startswith("{")]
    names = [event["event"] for event in events if event["event"] != "quantizing"]
    assert names == ["plan", "progress", "progress", "publishing", "published"]
    plan = next(event for event in events if event["event"] == "plan")
    assert plan["blocks"] == 1
    assert plan["resumed_blocks"] == 0
    assert plan["memory_available_bytes"] == 64 << 30
    assert 100 * MIB < plan["memory_bytes"] < 8 << 30
    assert all(event["seconds"] >= 0 for event in events if event["event"] == "progress")


def test_without_a_limit_it_is_the_machine_that_refuses(attempt, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
    status, lines = attempt()
    assert status == 1
    assert lines[-1].startswith("error: memory: ")


def test_a_device_too_small_is_named(make_checkpoint, monkeypatch):
    from services.quantizer import estimate as module
    from services.quantizer.config import QuantizerConfig
    from services.quantizer.errors import QuantizerError

    config = QuantizerConfig(source="s", artifacts="a", name="tiny", device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 << 20, 1 << 40))
    with pytest.raises(QuantizerError, match=r"memory of cuda: .* 1 MiB available; .* a block in fp32"):
        module.check_fits(workload(block_parameters=10**8), config, torch.device("cuda"))
