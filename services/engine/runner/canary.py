"""Replays an artifact's canary: prompts whose likeliest next tokens and logprobs the quantizer's own model
code found.

Two implementations that agree position by position have loaded the same weights the same way. Knows the model
and the cache memory, which must not be in use yet.
"""

from __future__ import annotations

import torch

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.models.llama import Llama
from services.engine.runner.inputs import make_inputs
from services.engine.runner.kv_cache import KVCache
from services.engine.runner.logprobs import row_logsumexp
from weft.artifact.manifest import ArtifactError, Canary, CanaryPrompt

MARGIN = 0.5
"""Top-1 must match where the recorded fp32 logits lead by more than this."""

LOGPROB_TOLERANCE = {torch.float32: 0.001, torch.bfloat16: 0.15, torch.float16: 0.15}


class CanaryError(ArtifactError):
    """The loaded model does not answer as the artifact says it must."""


@torch.inference_mode()
def replay_canary(
    canary: Canary, model: Llama, cache: KVCache, dtype: torch.dtype, max_model_len: int
) -> int:
    """Replay as many positions as fit the context and the cache; returns how many. Raises CanaryError, also
    when there is none: nothing replayed shows nothing.
    """
    room = min(max_model_len, cache.num_blocks * cache.block_size)
    checked = 0
    for number, prompt in enumerate(canary.prompts):
        length = min(len(prompt.token_ids), room)
        if length:
            _replay(number, prompt, length, model, cache, LOGPROB_TOLERANCE[dtype])
            checked += length
    if not checked:
        raise CanaryError("the canary has no position to check")
    return checked


def _replay(
    number: int, prompt: CanaryPrompt, length: int, model: Llama, cache: KVCache, tolerance: float
) -> None:
    ids = list(prompt.token_ids[:length])
    if max(ids) >= model.config.vocab_size:
        raise CanaryError(f"canary prompt {number}: token id {max(ids)} outside of the vocabulary")
    sequence = Sequence(key="canary", prompt_token_ids=ids, params=SamplingParams(max_tokens=1))
    sequence.block_table = list(range(-(-length // cache.block_size)))
    chunks = [Chunk(sequence, 0, length, False)]
    inputs = make_inputs(chunks, cache.block_size, cache.scratch_block, 16, cache.device)
    rows = torch.arange(length, device=cache.device)
    logits = model.forward(inputs.token_ids, inputs.metadata, cache.layers, rows).cpu()
    if not bool(torch.isfinite(logits).all()):
        raise CanaryError(f"canary prompt {number}: logits are not finite")
    expected = torch.tensor(prompt.expected_token_ids[:length])
    if int(expected.max()) >= model.config.vocab_size:
        raise CanaryError(
            f"canary prompt {number}: expected id {int(expected.max())} outside of the vocabulary"
        )
    is_wrong = (logits.argmax(-1) != expected) & (torch.tensor(prompt.margins[:length]) > MARGIN)
    if bool(is_wrong.any()):
        position = int(is_wrong.nonzero()[0])
        raise CanaryError(
            f"canary prompt {number}, position {position}: token {int(logits[position].argmax())} is the "
            f"likeliest, the artifact says {int(expected[position])} by a margin of "
            f"{prompt.margins[position]:.3f}; {int(is_wrong.sum())} of {length} positions differ"
        )
    found = (logits.gather(1, expected[:, None]).double() - row_logsumexp(logits)).squeeze(1)
    deviation = (found - torch.tensor(prompt.logprobs[:length], dtype=torch.float64)).abs()
    if float(deviation.max()) > tolerance:
        position = int(deviation.argmax())
        raise CanaryError(
            f"canary prompt {number}, position {position}: logprob {float(found[position]):.5f}, "
            f"the artifact says {prompt.logprobs[position]:.5f}; at most {tolerance} apart is accepted"
        )
