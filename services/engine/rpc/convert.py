"""Between protobuf and the core, both ways. Pure: no clock, no stream, no state.

What arrives is checked before it is converted: every function that makes a `Sequence` expects that `check`
found nothing wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.engine.core.events import FinishedEvent, StepReport
from services.engine.core.sequence import FinishReason, SamplingParams, Sequence
from services.engine.rpc.errors import status_error
from weft.limits import DEFAULT_LIMITS, RequestLimits
from weft.rpc.errors import failure_from
from weft.rpc.unknown_fields import unknown_fields
from weft.sampling import (
    FieldViolation,
    validate_labels,
    validate_length,
    validate_sampling,
    validate_token_ids,
)
from weft.v1 import engine_service_pb2 as pb
from weft.v1 import generation_pb2 as generation_pb

if TYPE_CHECKING:
    from services.engine.runner.config import RunnerInfo

PROTOCOL_VERSION = 1
MAX_RETAIN_SECONDS = 86_400
CAPABILITIES = ("logprobs", "pause", "resume")

_REASONS = {
    FinishReason.STOP: generation_pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: generation_pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: generation_pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: generation_pb.FINISH_REASON_ERROR,
}


def check(
    request: pb.Submit | pb.GenerateTokensRequest,
    info: pb.GetInfoResponse,
    limits: RequestLimits = DEFAULT_LIMITS,
) -> list[FieldViolation]:
    """What is wrong with a request for this engine. Lengths first: what is too long is not looked through."""
    num_prompt = len(request.prompt_token_ids)
    sampling = request.sampling
    found = validate_sampling(
        sampling, vocab_size=info.vocab_size, max_model_len=info.max_model_len, max_n=1, limits=limits
    )
    found += validate_labels(
        request_id=request.request_id, priority=request.priority, cache_salt=request.cache_salt
    )
    is_bridged = isinstance(request, pb.Submit)
    for name in ("seed", "max_tokens"):
        if is_bridged and not sampling.HasField(name):
            found.append(FieldViolation(f"sampling.{name}", "must be set"))
    if isinstance(request, pb.Submit) and request.retain_seconds > MAX_RETAIN_SECONDS:
        found.append(FieldViolation("retain_seconds", f"must be at most {MAX_RETAIN_SECONDS}"))
    if found:
        return found
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
    found += validate_length(
        num_prompt_tokens=num_prompt, max_tokens=max_tokens, max_model_len=info.max_model_len
    )
    room = info.max_model_len - num_prompt if max_tokens is None else max_tokens
    if not found and sampling.min_tokens > room:
        found.append(FieldViolation("sampling.min_tokens", f"must not be above the {room} tokens of room"))
    if not found and len(request.emitted_token_ids) > room:
        found.append(FieldViolation("emitted_token_ids", f"are more than the {room} tokens of the output"))
    if not found:
        found += validate_token_ids(
            request.prompt_token_ids, vocab_size=info.vocab_size, field="prompt_token_ids"
        )
        found += validate_token_ids(
            request.emitted_token_ids,
            vocab_size=info.vocab_size,
            field="emitted_token_ids",
            can_be_empty=True,
        )
    if not found:
        found += [FieldViolation(path, "is no field of this version") for path in unknown_fields(request)]
    return found


def sampling_params(params: generation_pb.SamplingParams, *, seed: int, max_tokens: int) -> SamplingParams:
    """The core's parameters: what is unset takes its default; `seed` and `max_tokens` are resolved by the
    caller.
    """

    def value(name: str, default: float) -> float:
        return float(getattr(params, name)) if params.HasField(name) else default

    return SamplingParams(
        max_tokens=max_tokens,
        # -0.0 is as greedy as 0.0, and nothing behind this line has to know.
        temperature=abs(value("temperature", 1.0)),
        top_k=params.top_k,
        top_p=value("top_p", 1.0),
        min_p=params.min_p,
        seed=seed,
        repetition_penalty=value("repetition_penalty", 1.0),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in params.logit_bias),
        stop_token_ids=frozenset(params.stop_token_ids),
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs if params.HasField("logprobs") else None,
    )


def sequence(
    request: pb.Submit | pb.GenerateTokensRequest,
    info: pb.GetInfoResponse,
    *,
    seed: int,
    deadline: float | None,
) -> Sequence:
    """The sequence of a checked request. `deadline` is in seconds of the core's clock; the loop sets the
    key.
    """
    prompt = list(request.prompt_token_ids)
    sampling = request.sampling
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else info.max_model_len - len(prompt)
    return Sequence(
        key=None,
        prompt_token_ids=prompt,
        params=sampling_params(sampling, seed=seed, max_tokens=max_tokens),
        emitted_token_ids=request.emitted_token_ids,
        sample_index=request.sample_index,
        priority=request.priority,
        deadline=deadline,
        must_complete=request.must_complete,
        eos_token_ids=frozenset(info.eos_token_ids),
        cache_salt=request.cache_salt,
        retain_s=float(request.retain_seconds) if isinstance(request, pb.Submit) else 0.0,
    )


def add_logprobs(
    entry: pb.EntryLogprobs, logprob: float, top_logprobs: tuple[tuple[int, float], ...]
) -> None:
    """Fill in the log-probabilities of one token."""
    entry.logprob = logprob
    for token_id, top_logprob in top_logprobs:
        entry.top_token_ids.append(token_id)
        entry.top_logprobs.append(top_logprob)


def finished(slot: int, event: FinishedEvent) -> pb.Finished:
    """The end of a slot."""
    message = pb.Finished(
        slot=slot,
        reason=_REASONS[event.reason],
        usage=generation_pb.Usage(
            prompt_tokens=event.num_prompt_tokens,
            completion_tokens=event.num_output_tokens,
            cached_tokens=event.num_cached_tokens,
        ),
        receipt=generation_pb.Receipt(
            queue_ms=1000 * event.queue_s,
            first_token_ms=1000 * (event.ttft_s or 0.0),
            total_ms=1000 * event.total_s,
            preemptions=event.num_preemptions,
        ),
    )
    if event.error is not None:
        message.failure.CopyFrom(failure_from(status_error(event.error)))
    return message


def load_response(report: StepReport, *, is_draining: bool) -> pb.GetLoadResponse:
    """The loop's newest snapshot."""
    counters, blocks = report.counters, report.blocks
    return pb.GetLoadResponse(
        running=report.num_running,
        waiting=report.num_waiting,
        paused=report.num_paused,
        free_blocks=blocks.free,
        active_blocks=blocks.active,
        cached_blocks=blocks.cached,
        steps=counters.steps,
        preemptions=counters.preemptions,
        prefix_cache_queries=counters.cache_queries,
        prefix_cache_hits=counters.cache_hits,
        requests_begun=counters.begun,
        requests_ended=counters.ended,
        peak_batch_size=counters.peak_batch_size,
        generation_tokens=counters.generation_tokens,
        prompt_tokens=counters.prompt_tokens,
        is_draining=is_draining,
    )


def info_response(
    info: RunnerInfo,
    *,
    max_batch_size: int,
    max_batched_tokens: int,
    max_queue_size: int,
    has_prefix_cache: bool,
    weft_version: str,
) -> pb.GetInfoResponse:
    """What the runner says of itself, and the limits of the scheduler."""
    message = pb.GetInfoResponse(
        model_name=info.model_name,
        artifact_version=info.artifact_version,
        artifact_digest=info.artifact_digest,
        tokenizer_digest=info.tokenizer_digest,
        architecture=info.architecture,
        numerics_id=info.numerics_id,
        is_deterministic=info.is_deterministic,
        device=info.device,
        dtype=info.dtype,
        kv_dtype=info.kv_dtype,
        vocab_size=info.vocab_size,
        eos_token_ids=info.eos_token_ids,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        max_queue_size=max_queue_size,
        kernel_paths=info.kernel_paths,
        weight_bytes=info.weight_bytes,
        kv_bytes_per_token=info.kv_bytes_per_token,
        weft_version=weft_version,
        capabilities=(*CAPABILITIES, "prefix_cache") if has_prefix_cache else CAPABILITIES,
    )
    if info.crossover_rows is not None:
        message.kernel_paths["linear_crossover"] = f"{info.crossover_rows} rows"
    if info.bos_token_id is not None:
        message.bos_token_id = info.bos_token_id
    return message
