"""Windows, caps, two rotations, interleaved and permuted projections: for every architecture a row has the
bits it has alone, behind the real core, in any batch, chunk, block size, from the prefix cache and after
preemption.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from services.engine.core.sequence import SamplingParams  # noqa: E402
from services.engine.runner.config import RunnerConfig  # noqa: E402
from services.engine.runner.model_runner import load_runner  # noqa: E402
from tests.integration.test_equality import run  # noqa: E402
from tests.services.engine.models.checkpoints import (  # noqa: E402
    GEMMA2,
    GEMMA3,
    INTERNLM2,
    INTERNLM3,
    PHI3,
    quantize_checkpoint,
    write_checkpoint,
)

LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
}
MODELS: dict[str, dict[str, Any]] = {
    "internlm2": INTERNLM2,
    "internlm3": INTERNLM3,
    "phi3": {
        **PHI3,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 64,
    },
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}


def make_requests():
    """18 requests, half of them greedy: prompts of 1 to 150 tokens, most sharing a head."""
    rng = random.Random(5)
    heads = [[rng.randrange(2, 97) for _ in range(count)] for count in (20, 70, 128)]
    requests = []
    for i in range(18):
        head = heads[i % 3] if i % 4 else []
        prompt = [0, *head, *(rng.randrange(2, 97) for _ in range(rng.choice([0, 1, 22])))]
        params = SamplingParams(max_tokens=12, temperature=float(i % 2), seed=i, ignore_eos=True)
        requests.append((i, prompt, params))
    return requests


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_together_equals_alone(name, kv_dtype, tmp_path):
    plain = write_checkpoint(tmp_path / "plain", MODELS[name])
    packed = quantize_checkpoint(plain, tmp_path / "packed", 32)
    runners = {
        size: load_runner(
            RunnerConfig(
                source=packed,
                dtype="float32",
                kv_dtype=kv_dtype,
                block_size=size,
                num_blocks=12 * 256 // size,
                max_model_len=256,
                is_poisoned=True,
            )
        )
        for size in (16, 128)
    }
    requests = make_requests()
    tokens, logits = {}, {}
    for request in requests:
        own_tokens, own_logits, _ = run(runners[128], [request], prefix_cache=False)
        tokens |= own_tokens
        logits |= own_logits
    assert len(logits) == 18 * 12
    for size, chunk, num_blocks in ((16, 7, None), (128, 512, None), (16, 512, 15)):
        found, rows, counters = run(runners[size], requests, prefill_chunk=chunk, num_blocks=num_blocks)
        differing = [at for at, row in rows.items() if not torch.equal(row, logits[at])]
        assert not differing, f"blocks of {size}, chunks of {chunk}: {len(differing)}, first {differing[:3]}"
        assert found == tokens
        assert counters.cache_hits > 0
        assert (counters.preemptions > 0) == (num_blocks is not None)
