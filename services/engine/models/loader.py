"""Opens a model directory (our artifact, an AutoAWQ checkpoint or a plain one) and builds the model in
memory.

Knows files and limits; does not verify digests (the artifact store does) and does not run anything.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from services.engine.kernels.numerics import Numerics
from services.engine.models.config import ModelConfig, architecture_of, parse_eos_ids
from services.engine.models.fields import ConfigError
from services.engine.models.key_balance import balanced_keys
from services.engine.models.llama import Llama
from services.engine.models.registry import model_class
from services.engine.models.weights import WeightLoader
from weft.artifact.checkpoint import Checkpoint, CheckpointError
from weft.artifact.regular_file import FileRefusedError, read_regular
from weft.strict_json import StrictJsonError, parse_object

_MAX_GENERATION_CONFIG_SIZE = 1 << 20
_log = logging.getLogger(__name__)


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """config.json validated; end-of-sequence ids of generation_config.json, when it has some, replace
    config.json's.
    """
    raw = checkpoint.config
    config = model_class(architecture_of(raw)).parse(raw)
    path = checkpoint.directory / "generation_config.json"
    try:
        generation = parse_object(read_regular(path, _MAX_GENERATION_CONFIG_SIZE), str(path))
    except FileNotFoundError:
        return config
    except (OSError, FileRefusedError, StrictJsonError) as error:
        raise CheckpointError(str(error)) from error
    if generation.get("eos_token_id") is None:
        return config
    return replace(
        config, eos_token_ids=parse_eos_ids(generation["eos_token_id"], config.vocab_size, str(path))
    )


def resolve_max_model_len(config: ModelConfig, wanted: int | None) -> int:
    """The context length to serve. Raises ConfigError for more than the model has."""
    length = config.max_position if wanted is None else wanted
    if not 1 <= length <= config.max_position:
        raise ConfigError(f"max_model_len must be between 1 and {config.max_position}, found {length}")
    return length


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    numerics: Numerics,
    max_model_len: int,
    *,
    is_artifact: bool = False,
    balances_keys: bool = False,
    quantizes_head: bool = False,
) -> Llama:
    """Build the model; `balances_keys` evens out the channels of its keys, for a cache with integer codes;
    `quantizes_head` rounds its output head to 8 bits. Raises CheckpointError naming the tensor that is
    missing, misshapen or not finite.
    """
    loader = WeightLoader(checkpoint, config, numerics, is_strict=is_artifact, quantizes_head=quantizes_head)
    architecture = model_class(config.architecture)
    if config.rope.kind == "longrope" and max_model_len > config.rope.original_max_position:
        _log.warning(
            "longrope: all positions turn by the long factors, as max_model_len %d is more than %d, up to "
            "which the short ones would be taken",
            max_model_len,
            config.rope.original_max_position,
        )
    if balances_keys:
        loader.output_factors.update(balanced_keys(loader, config, architecture))
    model = architecture(config, loader, max_model_len)
    loader.check_all_used()
    return model
