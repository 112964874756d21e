"""manifest.json: what an artifact is made of, how it was made, and how good it was measured to be.

The manifest's own sha256 is the artifact's digest. Standard library only. This module does not know how the
numbers in it were computed, nor where artifacts are kept.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.artifact.regular_file import FileRefusedError, read_regular
from weft.strict_json import StrictJsonError, canonical_bytes, parse_object

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_SIZE = 64 << 20
MAX_TOKENIZER_SIZE = 256 << 20

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_MAX_TOKEN_ID = 1 << 31


class ArtifactError(Exception):
    """An artifact cannot be read, written or trusted."""


class ArtifactNotFound(ArtifactError):
    """No such model, version or artifact."""


class DigestMismatch(ArtifactError):
    """A file is not what the manifest says. `file`, `expected` and `found` say which and how."""

    def __init__(self, file: str, expected: str, found: str) -> None:
        super().__init__(f"{file}: expected {expected}, found {found}")
        self.file = file
        self.expected = expected
        self.found = found


@dataclass(frozen=True, slots=True)
class FileEntry:
    """`sha256` in lower-case hexadecimal, `size` in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class LinearError:
    """||X(W - W')||^2 / ||XW||^2 of one linear over the calibration set, judged with the stored scales.

    `rounding` is plain rounding of the unscaled weight, `chosen` what the artifact holds.
    """

    rounding: float
    chosen: float


@dataclass(frozen=True, slots=True)
class CanaryPrompt:
    """A prompt and what the quantized model answers in fp32, position by position.

    Entry i of the other three belongs to the logits after `token_ids[: i + 1]`: the most likely next token,
    its natural log probability under the raw distribution, and how far its logit leads the second best.
    """

    token_ids: tuple[int, ...]
    expected_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Canary:
    """Prompts that every engine replays after loading an artifact."""

    prompts: tuple[CanaryPrompt, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed manifest. `files` maps names to entries and never lists manifest.json or run.json.

    `recipe`, `quality` and the `source_digest` are the quantizer's; readers may show them but need not
    understand them.
    """

    model: str
    files: dict[str, FileEntry]
    source_digest: str
    recipe: dict[str, Any]
    seed: int
    calibration_digest: str
    tokenizer_digest: str
    linears: dict[str, LinearError] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    canary: Canary | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Parse manifest.json. Raises ArtifactError when it is not exactly what `to_bytes` would write."""
        try:
            document = parse_object(data, MANIFEST_NAME)
        except StrictJsonError as error:
            raise ArtifactError(str(error)) from None
        if document.get("format_version") != FORMAT_VERSION:
            found = str(document.get("format_version"))[:32]
            raise ArtifactError(
                f"{MANIFEST_NAME}: format version {found}; this program reads {FORMAT_VERSION}"
            )
        manifest = _from_document(document)
        if manifest.to_bytes() != data:
            raise ArtifactError(f"{MANIFEST_NAME}: not in its canonical spelling")
        return manifest

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests give equal bytes."""
        return canonical_bytes(asdict(self))

    @property
    def digest(self) -> str:
        """ "sha256:<hex>" of manifest.json: the identity of the artifact."""
        return "sha256:" + hashlib.sha256(self.to_bytes()).hexdigest()


def is_model_name(name: str) -> bool:
    """Whether `name` may name a model or a version: lower case, digits, `.`, `_`, `-`; at most 64; no
    leading mark.
    """
    return _MODEL_NAME.match(name) is not None


def is_file_name(name: str) -> bool:
    """Whether `name` may name a file inside of an artifact: one plain path component."""
    return _FILE_NAME.match(name) is not None


def tokenizer_digest(directory: Path) -> str:
    """ "sha256:<hex>" over tokenizer.json of `directory`. Raises ArtifactError when it cannot be read."""
    path = Path(directory) / "tokenizer.json"
    try:
        return "sha256:" + hashlib.sha256(read_regular(path, MAX_TOKENIZER_SIZE)).hexdigest()
    except FileNotFoundError:
        raise ArtifactNotFound(f"{path}: missing") from None
    except (OSError, FileRefusedError) as error:
        raise ArtifactError(str(error)) from error


def _from_document(document: dict[str, Any]) -> Manifest:
    expected = set(Manifest.__dataclass_fields__)
    if set(document) != expected:
        odd = sorted(set(document) ^ expected)
        raise ArtifactError(f"{MANIFEST_NAME}: missing or unknown: {', '.join(odd)[:200]}")
    model = document["model"]
    _require(isinstance(model, str) and is_model_name(model), "model", model)
    _require(type(document["seed"]) is int, "seed", document["seed"])
    _require(isinstance(document["recipe"], dict), "recipe", document["recipe"])
    _require(
        document["quality"] is None or isinstance(document["quality"], dict), "quality", document["quality"]
    )
    for key in ("source_digest", "calibration_digest", "tokenizer_digest"):
        _require(
            isinstance(document[key], str) and _DIGEST.match(document[key]) is not None, key, document[key]
        )
    return Manifest(
        model=model,
        files=_files(document["files"]),
        source_digest=document["source_digest"],
        recipe=document["recipe"],
        seed=document["seed"],
        calibration_digest=document["calibration_digest"],
        tokenizer_digest=document["tokenizer_digest"],
        linears=_linears(document["linears"]),
        quality=document["quality"],
        canary=_canary(document["canary"]),
    )


def _files(value: Any) -> dict[str, FileEntry]:
    _require(isinstance(value, dict), "files", value)
    files: dict[str, FileEntry] = {}
    for name, entry in value.items():
        _require(is_file_name(name) and name != MANIFEST_NAME, "files", name)
        _require(isinstance(entry, dict) and entry.keys() == {"sha256", "size"}, f"files.{name}", entry)
        digest, size = entry["sha256"], entry["size"]
        _require(isinstance(digest, str) and _HEX.match(digest) is not None, f"files.{name}.sha256", digest)
        _require(type(size) is int and size >= 0, f"files.{name}.size", size)
        files[name] = FileEntry(digest, size)
    return files


def _linears(value: Any) -> dict[str, LinearError]:
    _require(isinstance(value, dict), "linears", value)
    linears: dict[str, LinearError] = {}
    for name, errors in value.items():
        where = f"linears.{name}"
        _require(isinstance(errors, dict) and errors.keys() == {"rounding", "chosen"}, where, errors)
        _require(all(_is_number(number) for number in errors.values()), where, errors)
        linears[name] = LinearError(errors["rounding"], errors["chosen"])
    return linears


def _canary(value: Any) -> Canary | None:
    if value is None:
        return None
    _require(isinstance(value, dict) and value.keys() == {"prompts"}, "canary", value)
    _require(isinstance(value["prompts"], list), "canary.prompts", value["prompts"])
    return Canary(tuple(_canary_prompt(prompt) for prompt in value["prompts"]))


def _canary_prompt(value: Any) -> CanaryPrompt:
    where = "canary.prompts"
    _require(isinstance(value, dict) and value.keys() == set(CanaryPrompt.__dataclass_fields__), where, value)
    columns = [value[key] for key in ("token_ids", "expected_token_ids", "logprobs", "margins")]
    _require(
        all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns), where, value
    )
    for column in columns[:2]:
        _require(all(type(token) is int and 0 <= token < _MAX_TOKEN_ID for token in column), where, column)
    for column in columns[2:]:
        _require(all(_is_number(number) for number in column), where, column)
    return CanaryPrompt(*(tuple(column) for column in columns))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _require(holds: bool, where: str, found: Any) -> None:
    if not holds:
        raise ArtifactError(f"{MANIFEST_NAME}: {where}: {str(found)[:80]!r} is not acceptable")
