"""The real engine process with an oracle in place of the model: `python oracle_engine.py serve FLAGS`.

`--model` says how the runner behaves: "ok", "slow" (20 ms a step), "hang" (its third step takes long),
"fault" (the tenth step is a device fault), "unloadable", "stuck" (loads for ever).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from services.engine import application, serve
from services.engine.runner.config import RunnerInfo
from tests.services.engine.core.oracle import VOCABULARY, OracleRunner
from weft.rpc.server import exit_process

NUM_BLOCKS, BLOCK_SIZE = 256, 16


class MoodyRunner(OracleRunner):
    """The oracle with a mood."""

    def __init__(self, mood: str) -> None:
        super().__init__(NUM_BLOCKS, BLOCK_SIZE)
        self._mood = mood

    def forget(self, sequence: Any) -> None:
        """Keep no list of the forgotten: this process is watched for growth."""

    def forward(self, chunks: Any) -> Any:
        if self._mood == "slow":
            time.sleep(0.02)
        if self._mood == "hang" and self.num_forwards == 2:
            time.sleep(6)
        if self._mood == "fault" and self.num_forwards == 9:
            raise RuntimeError("CUDA error: device lost at 0xdeadbeef")
        return super().forward(chunks)


def load_model(config: Any) -> tuple[MoodyRunner, RunnerInfo]:
    if config.model == "unloadable":
        raise FileNotFoundError(2, "No such file or directory", "config.json")
    if config.model == "stuck":
        time.sleep(600)
    info = RunnerInfo(
        model_name="oracle", artifact_version="1", artifact_digest="sha256:0", tokenizer_digest="",
        architecture="Oracle", vocab_size=VOCABULARY, num_layers=1, max_model_len=2_000,
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, kv_bytes_per_token=4, weight_bytes=0, dtype="none",
        kv_dtype="none", device="cpu", numerics_id="oracle", is_deterministic=True, num_threads=1,
        bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
    return MoodyRunner(config.model), info


if __name__ == "__main__":
    application.load_model = load_model
    exit_process(serve.main(sys.argv[1:]))
