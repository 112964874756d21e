"""The files of an artifact that are not weights: configuration, tokenizer, chat template, generation
defaults.

They come from the source, read strictly; nothing that asks to run code passes. This module does not know
any numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.quantizer.config import AWQ, COMPRESSED_TENSORS
from services.quantizer.errors import QuantizerError
from services.quantizer.model_map import ARCHITECTURES
from weft.artifact.manifest import MAX_TOKENIZER_SIZE
from weft.artifact.publish import Staging
from weft.artifact.regular_file import FileRefusedError, read_regular
from weft.strict_json import StrictJsonError, parse_object

COMPANION_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
_MAX_SIZE = 16 << 20


def companion_files(directory: Path) -> dict[str, bytes]:
    """Name -> bytes of what the artifact takes over from the source; tokenizer.json is indispensable.

    A tokenizer class of the source's own is left out where the architecture is one that is known.
    """
    files: dict[str, bytes] = {}
    for name in COMPANION_NAMES:
        path = directory / name
        try:
            files[name] = read_regular(path, MAX_TOKENIZER_SIZE if name == "tokenizer.json" else _MAX_SIZE)
        except FileNotFoundError:
            if name == "tokenizer.json":
                raise QuantizerError(
                    f"{path}: missing; a SentencePiece model must be converted first"
                ) from None
        except (OSError, FileRefusedError) as error:
            raise QuantizerError(str(error)) from error
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = _without_code(files["tokenizer_config.json"], directory)
    documents = {
        name: _parse_document(files[name], directory / name)
        for name in ("tokenizer_config.json", "generation_config.json")
        if name in files
    }
    template = _embedded_template(documents.get("tokenizer_config.json", {}))
    try:
        if "chat_template.jinja" in files:
            files["chat_template.jinja"].decode("utf-8")
        elif template is not None:
            files["chat_template.jinja"] = template.encode("utf-8")
    except UnicodeError:
        raise QuantizerError(f"{directory}: the chat template is not UTF-8") from None
    return files


def write_companions(staged: Staging, files: dict[str, bytes]) -> None:
    """Write them into the artifact."""
    for name in sorted(files):
        staged.write(name, files[name])


def quantized_config(
    config: dict[str, Any], group_size: int, full_precision: list[str], file_format: str = AWQ
) -> bytes:
    """config.json of the artifact: the source's, and how its weights are packed."""
    packing: dict[str, Any] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": full_precision or None,
    }
    if file_format == COMPRESSED_TENSORS:
        packing = _pack_quantized(group_size, [_head(config), *full_precision])
    return json.dumps({**config, "quantization_config": packing}, indent=2).encode("utf-8") + b"\n"


def _head(config: dict[str, Any]) -> str:
    """The module of the output projection, as the checkpoint calls it."""
    known = [found for name, found in ARCHITECTURES.items() if config.get("architectures") == [name]]
    return known[0].head.removesuffix(".weight") if known else "lm_head"


def _pack_quantized(group_size: int, ignored: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # For transformers alone: compressed-tensors 0.19 cannot keep packed zero points packed when it loads.
        "dequantize": True,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        # The head is a Linear too, which nobody packs.
        "ignore": ignored,
    }


def _parse_document(data: bytes, path: Path) -> dict[str, Any]:
    try:
        document = parse_object(data, str(path))
    except StrictJsonError as error:
        raise QuantizerError(str(error)) from None
    if document.get("auto_map"):
        raise QuantizerError(f"{path}: auto_map asks to run code of the model; it never is")
    return document


def _without_code(data: bytes, directory: Path) -> bytes:
    """tokenizer_config.json, without the code that it names where config.json names an architecture that
    needs none. What is served is read from tokenizer.json.
    """
    try:
        document = parse_object(data, str(directory / "tokenizer_config.json"))
        config = parse_object(
            read_regular(directory / "config.json", _MAX_SIZE), str(directory / "config.json")
        )
    except (OSError, FileRefusedError, StrictJsonError):
        return data  # refused where it is read for its own sake
    if not document.get("auto_map") or config.get("architectures") not in [[name] for name in ARCHITECTURES]:
        return data
    del document["auto_map"]
    return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _embedded_template(document: dict[str, Any]) -> str | None:
    """The chat template of tokenizer_config.json: a string, or the one called default among named ones."""
    template = document.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None
