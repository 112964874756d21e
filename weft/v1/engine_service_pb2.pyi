from weft.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "update", "pause", "resume", "credit")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    submit: Submit
    cancel: Cancel
    update: Update
    pause: Pause
    resume: Resume
    credit: FrameCredit
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., credit: _Optional[_Union[FrameCredit, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("protocol_version", "gateway_id", "initial_credit_bytes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    INITIAL_CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    gateway_id: str
    initial_credit_bytes: int
    def __init__(self, protocol_version: _Optional[int] = ..., gateway_id: _Optional[str] = ..., initial_credit_bytes: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("slot", "request_id", "prompt_token_ids", "emitted_token_ids", "sampling", "sample_index", "priority", "budget_ms", "must_complete", "cache_salt", "retain_seconds")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_MS_FIELD_NUMBER: _ClassVar[int]
    MUST_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    RETAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    emitted_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _generation_pb2.SamplingParams
    sample_index: int
    priority: int
    budget_ms: int
    must_complete: bool
    cache_salt: str
    retain_seconds: int
    def __init__(self, slot: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., emitted_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., sample_index: _Optional[int] = ..., priority: _Optional[int] = ..., budget_ms: _Optional[int] = ..., must_complete: bool = ..., cache_salt: _Optional[str] = ..., retain_seconds: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("slot", "priority", "budget_ms")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_MS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    priority: int
    budget_ms: int
    def __init__(self, slot: _Optional[int] = ..., priority: _Optional[int] = ..., budget_ms: _Optional[int] = ...) -> None: ...

class Pause(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class FrameCredit(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("hello", "accepted", "rejected", "frame", "heartbeat", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: EngineHello
    accepted: Accepted
    rejected: Rejected
    frame: StepFrame
    heartbeat: Heartbeat
    draining: Draining
    def __init__(self, hello: _Optional[_Union[EngineHello, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., frame: _Optional[_Union[StepFrame, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class EngineHello(_message.Message):
    __slots__ = ("protocol_version", "epoch", "info")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    epoch: int
    info: GetInfoResponse
    def __init__(self, protocol_version: _Optional[int] = ..., epoch: _Optional[int] = ..., info: _Optional[_Union[GetInfoResponse, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("epoch", "slot")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    slot: int
    def __init__(self, epoch: _Optional[int] = ..., slot: _Optional[int] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("epoch", "slot", "failure")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    slot: int
    failure: _generation_pb2.Failure
    def __init__(self, epoch: _Optional[int] = ..., slot: _Optional[int] = ..., failure: _Optional[_Union[_generation_pb2.Failure, _Mapping]] = ...) -> None: ...

class StepFrame(_message.Message):
    __slots__ = ("epoch", "step", "slots", "token_ids", "positions", "logprobs", "finished")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[EntryLogprobs]
    finished: _containers.RepeatedCompositeFieldContainer[Finished]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[EntryLogprobs, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[Finished, _Mapping]]] = ...) -> None: ...

class EntryLogprobs(_message.Message):
    __slots__ = ("entry", "logprob", "top_token_ids", "top_logprobs")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    entry: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, entry: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("slot", "reason", "usage", "receipt", "failure")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    reason: _generation_pb2.FinishReason
    usage: _generation_pb2.Usage
    receipt: _generation_pb2.Receipt
    failure: _generation_pb2.Failure
    def __init__(self, slot: _Optional[int] = ..., reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ..., receipt: _Optional[_Union[_generation_pb2.Receipt, _Mapping]] = ..., failure: _Optional[_Union[_generation_pb2.Failure, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("epoch", "step", "step_elapsed_ms", "step_bound_ms", "running", "waiting", "waiting_tokens", "tokens_per_second", "free_blocks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_BOUND_MS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    step_elapsed_ms: int
    step_bound_ms: int
    running: int
    waiting: int
    waiting_tokens: int
    tokens_per_second: float
    free_blocks: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., step_elapsed_ms: _Optional[int] = ..., step_bound_ms: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., free_blocks: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("epoch", "deadline_ms")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    deadline_ms: int
    def __init__(self, epoch: _Optional[int] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class GenerateTokensRequest(_message.Message):
    __slots__ = ("prompt_token_ids", "emitted_token_ids", "sampling", "sample_index", "priority", "cache_salt", "request_id", "must_complete")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MUST_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    emitted_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _generation_pb2.SamplingParams
    sample_index: int
    priority: int
    cache_salt: str
    request_id: str
    must_complete: bool
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., emitted_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., sample_index: _Optional[int] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., request_id: _Optional[str] = ..., must_complete: bool = ...) -> None: ...

class GenerateTokensResponse(_message.Message):
    __slots__ = ("token_ids", "position", "logprobs", "finished", "seed")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    position: int
    logprobs: _containers.RepeatedCompositeFieldContainer[EntryLogprobs]
    finished: Finished
    seed: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., position: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[EntryLogprobs, _Mapping]]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("model_name", "artifact_version", "artifact_digest", "tokenizer_digest", "architecture", "numerics_id", "is_deterministic", "device", "dtype", "kv_dtype", "vocab_size", "eos_token_ids", "bos_token_id", "block_size", "num_blocks", "max_model_len", "max_batch_size", "max_batched_tokens", "max_queue_size", "kernel_paths", "weight_bytes", "kv_bytes_per_token", "weft_version", "capabilities")
    class KernelPathsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_ID_FIELD_NUMBER: _ClassVar[int]
    IS_DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_SIZE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_PATHS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WEFT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    artifact_version: str
    artifact_digest: str
    tokenizer_digest: str
    architecture: str
    numerics_id: str
    is_deterministic: bool
    device: str
    dtype: str
    kv_dtype: str
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bos_token_id: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_batch_size: int
    max_batched_tokens: int
    max_queue_size: int
    kernel_paths: _containers.ScalarMap[str, str]
    weight_bytes: int
    kv_bytes_per_token: int
    weft_version: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_name: _Optional[str] = ..., artifact_version: _Optional[str] = ..., artifact_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., architecture: _Optional[str] = ..., numerics_id: _Optional[str] = ..., is_deterministic: bool = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., bos_token_id: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., max_batched_tokens: _Optional[int] = ..., max_queue_size: _Optional[int] = ..., kernel_paths: _Optional[_Mapping[str, str]] = ..., weight_bytes: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., weft_version: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("running", "waiting", "paused", "free_blocks", "active_blocks", "cached_blocks", "steps", "preemptions", "prefix_cache_queries", "prefix_cache_hits", "requests_begun", "requests_ended", "peak_batch_size", "generation_tokens", "prompt_tokens", "is_draining")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_BEGUN_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_ENDED_FIELD_NUMBER: _ClassVar[int]
    PEAK_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    paused: int
    free_blocks: int
    active_blocks: int
    cached_blocks: int
    steps: int
    preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    requests_begun: int
    requests_ended: int
    peak_batch_size: int
    generation_tokens: int
    prompt_tokens: int
    is_draining: bool
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., paused: _Optional[int] = ..., free_blocks: _Optional[int] = ..., active_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., steps: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_cache_queries: _Optional[int] = ..., prefix_cache_hits: _Optional[int] = ..., requests_begun: _Optional[int] = ..., requests_ended: _Optional[int] = ..., peak_batch_size: _Optional[int] = ..., generation_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., is_draining: bool = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("live",)
    LIVE_FIELD_NUMBER: _ClassVar[int]
    live: int
    def __init__(self, live: _Optional[int] = ...) -> None: ...
