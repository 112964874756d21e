"""The mock engine's flags, and what they mean to a real engine's configuration."""

# ruff: noqa: RUF009 - `option` makes a dataclass field

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from services.engine.config import EngineConfig
from services.engine.runner.config import RunnerInfo
from tools.mock_engine import oracle
from weft.artifact.manifest import tokenizer_digest
from weft.config import ConfigError, load_config, option
from weft.limits import SamplingLimitFlags, limit_flag
from weft.logs import LEVELS
from weft.rpc.address import Address, parse_address
from weft.rpc.guard import ServerFlags

PROG = "python -m tools.mock_engine serve"
ENV_PREFIX = "WEFT_MOCK_ENGINE_"
DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
DEMO_VOCABULARY = 4096
DEMO_BOS_TOKEN_ID, DEMO_EOS_TOKEN_ID = 0, 1


@dataclass(frozen=True)
class MockConfig(ServerFlags, SamplingLimitFlags):
    """Flags of `serve`. What an engine has, too, means the same here."""

    listen: Address = option(
        parse_address("127.0.0.1:0"), "address to listen on", parse=parse_address, metavar="HOST:PORT"
    )
    tokenizer: Path = option(
        DEMO_MODEL, "directory whose tokenizer.json this engine claims to use", metavar="DIR"
    )
    model: str = option("demo", "name of the model", metavar="NAME")
    version: str = option("v1", "version of the artifact", metavar="V")
    digest: str = option("sha256:mock", "digest of the artifact")
    numerics_id: str = option("mock", "engines of one such id draw the same tokens", metavar="ID")
    step_ms: float = option(5.0, "how long a step takes", metavar="MS")
    token_us: float = option(0.0, "how much longer for each token it computes", metavar="US")
    hang_seconds: float = option(60.0, "how long the step after a SIGUSR2 hangs", metavar="S")
    vocabulary: int = option(
        oracle.NUM_TOKEN_IDS, f"how many ids are drawn, from {oracle.FIRST_TOKEN_ID} on", metavar="N"
    )
    num_blocks: int = option(4096, "blocks of the KV cache", metavar="N")
    block_size: int = option(16, "tokens in a block", metavar="N")
    max_batch_size: int = option(256, "sequences that run at once", metavar="N")
    max_batched_tokens: int = option(8192, "tokens that one step computes", metavar="N")
    prefill_chunk: int = option(512, "prompt tokens of one sequence that one step computes", metavar="N")
    max_queue_size: int = option(512, "sequences that may wait", metavar="N")
    max_model_len: int = option(8192, "longest prompt and output together", metavar="N")
    prefix_cache: bool = option(True, "reuse the cache of earlier prompts")
    metrics: Address | None = option(
        None, "address to serve Prometheus metrics on", parse=parse_address, metavar="HOST:PORT"
    )
    api_key_file: Path | None = option(
        None, "file of hashed API keys; without it everybody may call", metavar="FILE"
    )
    max_message_bytes: int = limit_flag("max_message_bytes", 64 << 20)
    drain_seconds: float = option(30.0, "how long running sequences may go on after a signal", metavar="S")
    log_level: str = option("info", "what is logged", choices=LEVELS)

    def __post_init__(self) -> None:
        for name in ("step_ms", "token_us", "hang_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError("--" + name.replace("_", "-"), "must not be negative")
        if not 1 <= self.vocabulary <= oracle.NUM_TOKEN_IDS:
            raise ConfigError("--vocabulary", f"must be 1 to {oracle.NUM_TOKEN_IDS}")
        self.engine()

    def engine(self) -> EngineConfig:
        """The configuration of the real parts. Raises ConfigError, which names the flag."""
        guarded = [*fields(ServerFlags), *fields(SamplingLimitFlags)]
        return EngineConfig(
            **{field.name: getattr(self, field.name) for field in guarded},
            api_key_file=self.api_key_file,
            source=self.tokenizer,
            model=self.model,
            listen=self.listen,
            metrics=self.metrics,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_batch_size=self.max_batch_size,
            max_batched_tokens=self.max_batched_tokens,
            prefill_chunk=self.prefill_chunk,
            max_model_len=self.max_model_len,
            max_queue_size=self.max_queue_size,
            prefix_cache=self.prefix_cache,
            drain_seconds=self.drain_seconds,
            log_level=self.log_level,
        )

    def info(self) -> RunnerInfo:
        """What the engine says of itself. Reads the tokenizer; raises OSError or ArtifactError."""
        return RunnerInfo(
            model_name=self.model,
            artifact_version=self.version,
            artifact_digest=self.digest,
            tokenizer_digest=tokenizer_digest(self.tokenizer),
            architecture="Mock",
            vocab_size=DEMO_VOCABULARY,
            num_layers=1,
            max_model_len=self.max_model_len,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            kv_bytes_per_token=oracle.TOKEN_BYTES,
            weight_bytes=0,
            dtype="none",
            kv_dtype="none",
            device="none",
            numerics_id=self.numerics_id,
            is_deterministic=True,
            num_threads=1,
            bos_token_id=DEMO_BOS_TOKEN_ID,
            eos_token_ids=(DEMO_EOS_TOKEN_ID,),
        )


def load(argv: Sequence[str]) -> MockConfig:
    """The configuration of one process. Exits with one line on a bad value."""
    return load_config(MockConfig, argv, prog=PROG, env_prefix=ENV_PREFIX)
