"""Perplexity through the engine on held-out text: 4-bit weights in bfloat16 stay near the source, quantised K
and V near full precision.
"""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

from services.engine.core.batch import Chunk  # noqa: E402
from services.engine.core.sequence import SamplingParams, Sequence  # noqa: E402
from services.engine.runner.config import RunnerConfig  # noqa: E402
from services.engine.runner.inputs import make_inputs  # noqa: E402
from services.engine.runner.model_runner import load_runner  # noqa: E402
from services.quantizer.config import QuantizerConfig  # noqa: E402
from services.quantizer.job import run  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 512
NUM_WINDOWS = 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def windows(demo_model):
    """Held-out text in windows that begin as the model was trained: with its first token."""
    tokenizer = tokenizers.Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    text = (ROOT / "services/quantizer/data/evaluation_alice.txt").read_text(encoding="utf-8")
    joined = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    ids = tokenizer.encode(joined, add_special_tokens=False).ids
    return [[0, *ids[i : i + WINDOW - 1]] for i in range(0, NUM_WINDOWS * (WINDOW - 1), WINDOW - 1)]


def perplexity(windows, **source):
    """exp of the mean negative log-likelihood of each token after a window's first, by the engine."""
    runner = load_runner(RunnerConfig(**source, num_blocks=8, max_model_len=WINDOW, num_threads=2))
    total = 0.0
    for ids in windows:
        sequence = Sequence("window", ids, SamplingParams(max_tokens=1), block_table=list(range(4)))
        inputs = make_inputs([Chunk(sequence, 0, WINDOW, False)], 128, runner.cache.scratch_block, 16)
        with torch.inference_mode():
            logits = runner.model.forward(
                inputs.token_ids, inputs.metadata, runner.cache.layers, torch.arange(WINDOW)
            )
        targets = torch.tensor(ids[1:])
        total += torch.nn.functional.cross_entropy(logits[:-1].double(), targets).item()
    return torch.tensor(total / len(windows)).exp().item(), runner.info


def test_bfloat16_and_float32_engines_stay_near_the_source(windows, demo_model, tmp_path):
    run(
        QuantizerConfig(source=demo_model, artifacts=tmp_path, name="demo", evaluation_tokens=2048, threads=2)
    )
    source, _ = perplexity(windows, source=demo_model, dtype="float32")
    exact, exact_info = perplexity(windows, artifacts=tmp_path, model="demo", dtype="float32")
    fast, fast_info = perplexity(windows, artifacts=tmp_path, model="demo", dtype="bfloat16")
    print(f"source {source:.3f}, 4-bit float32 {exact:.3f}, 4-bit bfloat16 {fast:.3f}")
    print(exact_info.kernel_paths, fast_info.kernel_paths)
    assert source < 60
    assert exact <= 1.025 * source
    assert fast <= 1.03 * source
    assert fast_info.dtype == "bfloat16"


def test_quantised_kv_stays_near_full_precision(windows, demo_model):
    source = {"source": demo_model, "dtype": "float32"}
    full, _ = perplexity(windows, **source)
    found = {name: perplexity(windows, **source, kv_dtype=name) for name in ("int8", "fp8", "int4")}
    print(f"full {full:.4f}, " + ", ".join(f"{name} {value:.4f}" for name, (value, _) in found.items()))
    for name, bound in (("int8", 1.005), ("fp8", 1.01), ("int4", 1.02)):
        value, info = found[name]
        assert info.kv_dtype == name
        assert value <= bound * full, name
        assert value != full
