"""Replays an artifact's canary: prompts whose likeliest next tokens and logprobs the quantizer's own model
code found.

Two implementations that agree position by position have loaded the same weights the same way. Knows the model
and the cache memory, which must not be in use yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from services.engine.core.batch import Chunk
from services.engine.core.sequence import SamplingParams, Sequence
from services.engine.kernels.kv_format import KVFormat
from services.engine.models.llama import Llama
from services.engine.runner.inputs import make_inputs
from services.engine.runner.kv_cache import KVCache
from services.engine.runner.logprobs import row_logsumexp
from weft.artifact.manifest import ArtifactError, Canary, CanaryPrompt


class Bounds(NamedTuple):
    """Top-1 must match where the recorded fp32 logits lead by more than `margin`, and the recorded token's
    logprob within `logprob`. Measured on the demo model, see docs/decisions/0701-kv-quantisation.md.
    """

    margin: float
    logprob: float


_LOGPROB_BOUNDS = {torch.float32: 0.001, torch.bfloat16: 0.15, torch.float16: 0.15}
_MARGIN = 0.5
_QUANTIZED_KV_BOUNDS = {"int8": Bounds(_MARGIN, 0.3), "fp8": Bounds(_MARGIN, 0.3), "int4": Bounds(1.0, 1.0)}


class CanaryError(ArtifactError):
    """The loaded model does not answer as the artifact says it must."""


def bounds_of(dtype: torch.dtype, kv_format: KVFormat) -> Bounds:
    """What activations in `dtype` over a cache in `kv_format` must keep to."""
    if kv_format.is_quantized:
        return _QUANTIZED_KV_BOUNDS[kv_format.name]
    return Bounds(_MARGIN, max(_LOGPROB_BOUNDS[dtype], _LOGPROB_BOUNDS[kv_format.storage]))


@torch.inference_mode()
def replay_canary(
    canary: Canary, model: Llama, cache: KVCache, dtype: torch.dtype, max_model_len: int
) -> int:
    """Replay as many positions as fit the context and the cache; returns how many. Raises CanaryError, also
    when there is none: nothing replayed shows nothing.
    """
    bounds = bounds_of(dtype, cache.kv_format)
    room = min(max_model_len, cache.num_blocks * cache.block_size)
    checked = 0
    for number, prompt in enumerate(canary.prompts):
        length = min(len(prompt.token_ids), room)
        if not length:
            continue
        try:
            _check(prompt, _logits(prompt, length, model, cache), bounds)
        except CanaryError as error:
            stored = (
                f" (K and V are stored in {cache.kv_format.name})" if cache.kv_format.is_quantized else ""
            )
            raise CanaryError(f"canary prompt {number}{error}{stored}") from None
        checked += length
    if not checked:
        raise CanaryError("the canary has no position to check")
    return checked


def _logits(prompt: CanaryPrompt, length: int, model: Llama, cache: KVCache) -> Tensor:
    """fp32 [length, vocab] of the prompt's first positions, on the CPU."""
    ids = list(prompt.token_ids[:length])
    if max(ids) >= model.config.vocab_size:
        raise CanaryError(f": token id {max(ids)} outside of the vocabulary")
    sequence = Sequence(key="canary", prompt_token_ids=ids, params=SamplingParams(max_tokens=1))
    sequence.block_table = list(range(-(-length // cache.block_size)))
    chunks = [Chunk(sequence, 0, length, False)]
    inputs = make_inputs(chunks, cache.block_size, cache.scratch_block, 16, cache.device)
    rows = torch.arange(length, device=cache.device)
    with model.serving(length):  # the quantizer ran prompts of this length and knows no longer context
        return model.forward(inputs.token_ids, inputs.metadata, cache.layers, rows).cpu()


def _check(prompt: CanaryPrompt, logits: Tensor, bounds: Bounds) -> None:
    length, vocab_size = logits.shape
    if not bool(torch.isfinite(logits).all()):
        raise CanaryError(": logits are not finite")
    expected = torch.tensor(prompt.expected_token_ids[:length])
    if int(expected.max()) >= vocab_size:
        raise CanaryError(f": expected id {int(expected.max())} outside of the vocabulary")
    is_wrong = (logits.argmax(-1) != expected) & (torch.tensor(prompt.margins[:length]) > bounds.margin)
    if bool(is_wrong.any()):
        position = int(is_wrong.nonzero()[0])
        raise CanaryError(
            f", position {position}: token {int(logits[position].argmax())} is the likeliest, the artifact "
            f"says {int(expected[position])} by a margin of {prompt.margins[position]:.3f}; "
            f"{int(is_wrong.sum())} of {length} positions differ"
        )
    found = (logits.gather(1, expected[:, None]).double() - row_logsumexp(logits)).squeeze(1)
    deviation = (found - torch.tensor(prompt.logprobs[:length], dtype=torch.float64)).abs()
    if float(deviation.max()) > bounds.logprob:
        position = int(deviation.argmax())
        raise CanaryError(
            f", position {position}: logprob {float(found[position]):.5f}, the artifact says "
            f"{prompt.logprobs[position]:.5f}; at most {bounds.logprob} apart is accepted"
        )
