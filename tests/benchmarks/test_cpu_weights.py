"""The weights that all systems of the comparison share: exactly the same in every format."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.cpu_gguf import gguf_name, interleaved, read_bfloat16
from benchmarks.cpu_profile import Clock
from benchmarks.cpu_shape import QUICK, TINY, tensor_names, to_spec
from benchmarks.cpu_weights import Q4_0_BLOCK, grid_weight, write_checkpoints
from benchmarks.cpu_worker import relative_error
from weft.artifact.packing import dequantize


def q4_0(weight):
    """GGUF's Q4_0, there and back: a block's scale is its largest number, sign kept, over -8."""
    blocks = weight.reshape(-1, Q4_0_BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = largest / -8
    numbers = np.clip(np.floor(blocks / scale + 8.5), 0, 15)
    return ((numbers - 8) * scale.astype(np.float16).astype(np.float32)).reshape(weight.shape)


def test_every_format_holds_the_same_weights():
    generator = torch.Generator().manual_seed(0)
    grid = grid_weight((64, 256), 0.02, 128, generator)
    weight = grid.dense()
    exact = (
        grid.numbers.view(64, 2, 128).double() - grid.zeros.unsqueeze(-1)
    ) * grid.scales.double().unsqueeze(-1)
    assert torch.equal(weight.double(), exact.view(64, 256))
    stored = dict(grid.awq("a"))
    unpacked = dequantize(stored["a.qweight"], stored["a.qzeros"], stored["a.scales"])
    assert torch.equal(unpacked.T, weight.float())
    assert np.array_equal(q4_0(weight.float().numpy()), weight.float().numpy())
    assert np.array_equal(weight.half().float().numpy(), weight.float().numpy())
    assert 0.012 < weight.float().std() < 0.03
    assert abs(weight.float().mean()) < 0.0005
    assert grid.scales.unique().numel() == 8
    assert set(grid.zeros.unique().tolist()) == {7, 8}


def test_the_checkpoint_is_read_without_torch_as_it_was_written(tmp_path):
    write_checkpoints(tmp_path, TINY)
    found = dict(read_bfloat16(tmp_path / "plain" / "model.safetensors"))
    assert {name: weight.shape for name, weight in found.items()} == dict(tensor_names(TINY))
    from safetensors.torch import load_file

    for name, weight in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert np.array_equal(found[name], weight.float().numpy())
    names = [gguf_name(name) for name in found]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.1.ffn_gate.weight"} <= set(names)


def test_neighbours_rotate_together_after_interleaving():
    # Channel i of a head of 8 pairs with i + 4; llama.cpp pairs 2 i with 2 i + 1.
    weight = np.arange(16, dtype=np.float32).reshape(16, 1)
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_an_error_is_of_the_worst_row():
    expected = np.array([[3.0, 4.0], [0.0, 2.0]])
    found = np.array([[3.0, 4.5], [0.0, 1.0]])
    assert relative_error(found, expected) == pytest.approx(0.5)
    assert relative_error(np.array([[np.nan, 0.0], [0.0, 2.0]]), expected) == float("inf")


def test_a_part_s_time_is_less_that_of_the_parts_within():
    now = iter([0.0, 1.0, 3.0, 10.0])
    clock = Clock(lambda: next(now))
    inner = clock.timed(lambda x: f"linear {x}", lambda x: x + 1)
    outer = clock.timed("step", lambda: inner(1))
    assert outer() == 2
    assert dict(clock.seconds) == {"linear 1": 2.0, "step": 8.0}


@pytest.mark.slow
@pytest.mark.parametrize("is_right", [True, False])
def test_all_three_systems_compute_the_same(tmp_path, root, is_right):
    """And llama.cpp does not, once its queries and keys are written in the other order."""
    environment = root / ".weft" / "bench-cpu-venv"
    if not (environment / "built").exists():
        pytest.skip("make bench-cpu has not built llama.cpp here")
    assert importlib.util.find_spec("transformers")
    folder, spec = tmp_path / "weights", tmp_path / "spec.json"
    spec.write_text(json.dumps({**to_spec(TINY, QUICK), "threads": 1, "folder": str(folder)}))
    rival = str(environment / "bin" / "python")
    subprocess.run([sys.executable, "-m", "benchmarks.cpu_weights", str(spec)], cwd=root, check=True)
    broken = "" if is_right else "g.interleaved = lambda weight, heads: weight; "
    script = f"import pathlib, sys; from benchmarks import cpu_gguf as g; {broken}"
    script += "g.prepare(pathlib.Path(sys.argv[1]))"
    subprocess.run([rival, "-c", script, str(folder)], cwd=root, check=True)
    limits = {
        "weft": (sys.executable, 0.02),
        "transformers": (sys.executable, 0.02),
        "llama.cpp": (rival, 0.04),
    }
    for name, (python, limit) in limits.items():
        told = subprocess.run(
            [python, "-m", "benchmarks.cpu_worker", name, str(spec)],
            cwd=root,
            input='{"do": "check"}\n',
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        errors = json.loads(told.splitlines()[1])["errors"]
        assert set(errors) == set(QUICK.cases)
        if name == "llama.cpp" and not is_right:
            assert min(errors.values()) > 0.1
        else:
            assert max(errors.values()) < limit, (name, errors)
