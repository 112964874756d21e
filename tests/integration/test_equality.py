"""A row's logits are the same bits, and its tokens the same, whatever else runs and however it is computed.

The real 4-bit model in float32 behind the real core. The reference computes each request alone, in one
chunk, in blocks of 128, without a prefix cache. Unowned cache memory holds NaN throughout.
"""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from services.engine.core.admission import CoreLimits  # noqa: E402
from services.engine.core.block_manager import BlockManager  # noqa: E402
from services.engine.core.engine_core import EngineCore  # noqa: E402
from services.engine.core.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from services.engine.core.sequence import SamplingParams, Sequence  # noqa: E402
from services.engine.runner.config import RunnerConfig  # noqa: E402
from services.engine.runner.model_runner import load_runner  # noqa: E402

NUM_REQUESTS = 64
MAX_TOKENS = 8


class Recorder:
    """Stands before a runner and keeps every sampled logits row by (key, completion offset)."""

    def __init__(self, runner):
        self.runner = runner
        self.logits = {}

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def sample(self, logits, chunks):
        for row, chunk in zip(logits, chunks, strict=True):
            sequence = chunk.sequence
            self.logits[sequence.key, sequence.num_output_tokens] = row.clone()
        return self.runner.sample(logits, chunks)


@pytest.fixture(scope="module")
def runners(rounded_demo):
    """One loaded runner per block size, its cache full of NaN."""
    return {
        size: load_runner(
            RunnerConfig(
                source=rounded_demo,
                dtype="float32",
                block_size=size,
                num_blocks=64 * 512 // size,
                max_model_len=512,
                num_threads=2,
                is_poisoned=True,
            )
        )
        for size in (16, 128)
    }


def make_requests():
    """64 requests, half of them greedy: prompts of 1 to 300 tokens, many sharing a head."""
    rng = random.Random(11)
    heads = [[rng.randrange(6, 4000) for _ in range(n)] for n in (5, 40, 128, 260)]
    requests = []
    for i in range(NUM_REQUESTS):
        head = heads[i % 4] if i % 3 else []
        prompt = [0, *head, *(rng.randrange(6, 4000) for _ in range(rng.choice([0, 1, 7, 30])))]
        penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5} if i % 5 == 0 else {}
        params = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=float(i % 2),
            seed=1000 + i,
            top_p=0.9,
            top_k=50 * (i % 3),
            **penalties,
        )
        requests.append((i, prompt, params))
    return requests


def run(runner, requests, *, prefix_cache=True, prefill_chunk=512, num_blocks=None, cut=0, outputs=None):
    """Run requests together. Returns their tokens and logits rows, and the core's counters."""
    info = runner.info
    runner.cache.reset(is_poisoned=True)
    recorder = Recorder(runner)
    blocks = BlockManager(num_blocks or info.num_blocks, info.block_size, has_prefix_cache=prefix_cache)
    scheduler = Scheduler(SchedulerConfig(max_batch_size=64, prefill_chunk=prefill_chunk), blocks)
    core = EngineCore(recorder, scheduler, blocks, CoreLimits(info.vocab_size, info.max_model_len))
    for key, prompt, params in requests:
        emitted = outputs[key][:cut] if outputs else []
        core.add(Sequence(key, list(prompt), params, list(emitted), sample_index=key % 3))
    tokens = {key: list(outputs[key][:cut]) if outputs else [] for key, _, _ in requests}
    while core.num_live:
        report = core.step()
        core.check_integrity()
        for token in report.tokens:
            tokens[token.key].append(token.token_id)
    assert blocks.counts().active == 0
    return tokens, recorder.logits, core.report().counters


@pytest.fixture(scope="module")
def alone(runners):
    """Each request by itself."""
    tokens, logits = {}, {}
    for request in make_requests():
        own_tokens, own_logits, _ = run(runners[128], [request], prefix_cache=False)
        tokens.update(own_tokens)
        logits.update(own_logits)
    return tokens, logits


def assert_equal(alone, tokens, logits):
    """Bits first, then tokens."""
    differing = [at for at, row in logits.items() if not torch.equal(row, alone[1][at])]
    assert not differing, f"{len(differing)} of {len(logits)} rows differ, first {sorted(differing)[:5]}"
    assert tokens == alone[0]


def test_the_reference_is_worth_comparing_with(alone):
    tokens, logits = alone
    assert len(logits) == NUM_REQUESTS * MAX_TOKENS
    assert len({tuple(output) for output in tokens.values()}) > NUM_REQUESTS // 2
    assert all(torch.isfinite(row).all() for row in logits.values())


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("prefill_chunk", [7, 512])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_together_equals_alone(runners, alone, block_size, prefill_chunk, prefix_cache):
    tokens, logits, counters = run(
        runners[block_size], make_requests(), prefix_cache=prefix_cache, prefill_chunk=prefill_chunk
    )
    assert_equal(alone, tokens, logits)
    assert (counters.cache_hits > 0) == prefix_cache
    assert counters.peak_batch_size > 32


@pytest.mark.parametrize(("block_size", "num_blocks"), [(16, 60), (128, 10)])
def test_preemption_changes_no_bit(runners, alone, block_size, num_blocks):
    tokens, logits, counters = run(runners[block_size], make_requests(), num_blocks=num_blocks)
    assert_equal(alone, tokens, logits)
    if block_size == 16:
        assert counters.preemptions > 0


@pytest.mark.parametrize("cut", range(1, MAX_TOKENS))
def test_a_resume_at_any_offset_changes_no_bit(runners, alone, cut):
    block_size = 16 if cut % 2 else 128
    tokens, logits, _ = run(runners[block_size], make_requests(), cut=cut, outputs=alone[0])
    assert len(logits) == NUM_REQUESTS * (MAX_TOKENS - cut)
    assert_equal(alone, tokens, logits)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request, rounded_demo):
    """(runners by block size with K and V quantised, sixteen of the requests, each by itself)."""
    loaded = {
        size: load_runner(
            RunnerConfig(
                source=rounded_demo,
                dtype="float32",
                kv_dtype=request.param,
                block_size=size,
                num_blocks=64 * 512 // size,
                max_model_len=512,
                num_threads=2,
                is_poisoned=True,
            )
        )
        for size in (16, 128)
    }
    requests = make_requests()[:16]
    tokens, logits = {}, {}
    for own in requests:
        own_tokens, own_logits, _ = run(loaded[128], [own], prefix_cache=False)
        tokens.update(own_tokens)
        logits.update(own_logits)
    return loaded, requests, (tokens, logits)


def test_quantised_kv_is_quantised(quantized, alone):
    _, _, (_, logits) = quantized
    assert all(torch.isfinite(row).all() for row in logits.values())
    assert not any(torch.equal(row, alone[1][at]) for at, row in logits.items())


@pytest.mark.parametrize(
    ("block_size", "prefill_chunk", "num_blocks"), [(16, 7, None), (128, 512, None), (16, 64, 26)]
)
def test_quantised_kv_changes_no_bit_with_the_batch(quantized, block_size, prefill_chunk, num_blocks):
    """Together, from a shared and partly copied prefix, in chunks, and after preemption."""
    loaded, requests, expected = quantized
    tokens, logits, counters = run(
        loaded[block_size], requests, prefill_chunk=prefill_chunk, num_blocks=num_blocks
    )
    assert_equal(expected, tokens, logits)
    assert counters.cache_hits > 0
    assert (counters.preemptions > 0) == (num_blocks is not None)


@pytest.mark.parametrize("cut", [1, 5])
def test_quantised_kv_resumes_with_the_same_bits(quantized, cut):
    loaded, requests, expected = quantized
    tokens, logits, _ = run(loaded[16], requests, cut=cut, outputs=expected[0])
    assert len(logits) == len(requests) * (MAX_TOKENS - cut)
    assert_equal(expected, tokens, logits)


def test_the_comparison_can_fail(rounded_demo, alone):
    """Without the deterministic mechanism the same comparison finds other bits: it is not vacuous."""
    fast = load_runner(
        RunnerConfig(
            source=rounded_demo,
            dtype="float32",
            is_deterministic=False,
            num_blocks=256,
            max_model_len=512,
            num_threads=2,
        )
    )
    _, logits, _ = run(fast, make_requests()[:16])
    shared = [at for at in logits if at in alone[1] and at[1] == 0]
    assert any(not torch.equal(logits[at], alone[1][at]) for at in shared)
