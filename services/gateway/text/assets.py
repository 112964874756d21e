"""What the gateway reads of a model: tokenizer, chat template, generation config. Never a weight.

Which files those are is the engine's word: its Hello names model and artifact version, and a tokenizer of
another digest than the engine's is refused, since its token ids would mean other text.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.gateway.text import strict_json
from services.gateway.text.chat_template import ChatTemplate, TemplateError
from services.gateway.text.detokenizer import Vocabulary
from services.gateway.text.generation_config import GenerationDefaults
from services.gateway.text.tokenization import TokenizationError, Tokenizer
from weft import logs
from weft.artifact.manifest import ArtifactError, tokenizer_digest
from weft.artifact.store import ArtifactStore
from weft.v1 import engine_service_pb2 as engine_pb

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MAX_CONFIG_BYTES = 16 << 20
MAX_CACHED = 4
log = logs.get_logger("gateway.assets")


class AssetError(Exception):
    """The files of a model are missing, bad, or not those the engine uses."""


@dataclass(slots=True, eq=False)
class ModelAssets:
    """The text side of one model. `template` is None when it has none, or a bad one: then `template_problem`
    says so.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    defaults: GenerationDefaults
    template: ChatTemplate | None
    template_problem: str
    digest: str

    async def close(self) -> None:
        """Let threads and child processes go."""
        self.tokenizer.close()
        if self.template is not None:
            await self.template.close()


class AssetSource:
    """Finds and keeps the assets that engines name: below an artifact root, or all in one directory.

    A few are kept for engines that come back; what `in_use` names is never closed.
    """

    def __init__(
        self,
        *,
        artifacts: Path | None = None,
        directory: Path | None = None,
        in_use: Callable[[], Collection[ModelAssets | None]] = tuple,
    ) -> None:
        if (artifacts is None) == (directory is None):
            raise ValueError("either artifacts or directory must be given")
        self._store = ArtifactStore(artifacts) if artifacts is not None else None
        self._directory = directory
        self._in_use = in_use
        self._cache: dict[tuple[str, str, str], ModelAssets] = {}
        self._lock = asyncio.Lock()

    async def load(self, info: engine_pb.GetInfoResponse) -> ModelAssets:
        """The assets of the model that `info` names. AssetError also when the tokenizer is another."""
        if not info.tokenizer_digest:
            raise AssetError("the engine has no tokenizer digest, so its token ids cannot be trusted")
        key = (info.model_name, info.artifact_version, info.tokenizer_digest)
        async with self._lock:
            assets = self._cache.pop(key, None)
            if assets is None:
                assets = await self._load(info)
            self._cache[key] = assets
            used = (*self._in_use(), assets)
            idle = [key for key, kept in self._cache.items() if kept not in used]
            for key in idle[: max(0, len(self._cache) - MAX_CACHED)]:
                await self._cache.pop(key).close()
        return assets

    async def close(self) -> None:
        """Close everything that was loaded."""
        async with self._lock:
            for assets in self._cache.values():
                await assets.close()
            self._cache.clear()

    async def _load(self, info: engine_pb.GetInfoResponse) -> ModelAssets:
        files = await asyncio.to_thread(self._read, info)
        digest = "sha256:" + hashlib.sha256(files[TOKENIZER]).hexdigest()
        if digest != info.tokenizer_digest:
            raise AssetError(f"tokenizer digest differs: engine {info.tokenizer_digest}, here {digest}")
        try:
            tokenizer = await asyncio.to_thread(Tokenizer, files[TOKENIZER])
            vocabulary = await asyncio.to_thread(Vocabulary, tokenizer)
        except TokenizationError as error:
            raise AssetError(str(error)) from error
        config = _json_object(files, TOKENIZER_CONFIG)
        defaults = GenerationDefaults.parse(_json_object(files, GENERATION_CONFIG))
        template, problem = await _start_template(_template_of(files, config), config)
        return ModelAssets(tokenizer, vocabulary, defaults, template, problem, digest)

    def _read(self, info: engine_pb.GetInfoResponse) -> dict[str, bytes]:
        try:
            if self._directory is not None:
                return _read_directory(self._directory)
            if self._store is None:
                raise AssetError("no place to read from")
            artifact = self._store.open(info.model_name, info.artifact_version or None)
            if artifact.manifest.tokenizer_digest != info.tokenizer_digest:
                raise AssetError(
                    f"tokenizer digest differs: engine {info.tokenizer_digest}, "
                    f"artifact {artifact.manifest.tokenizer_digest}"
                )
            names = (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE)
            return {
                name: self._store.read(artifact, name) for name in names if name in artifact.manifest.files
            }
        except ArtifactError as error:
            raise AssetError(str(error)) from error
        except OSError as error:
            raise AssetError(f"{error.filename}: {error.strerror}") from error


def _read_directory(directory: Path) -> dict[str, bytes]:
    tokenizer_digest(directory)  # refuses what is no regular file, or too large, before it is read
    files = {TOKENIZER: (directory / TOKENIZER).read_bytes()}
    for name in (TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE):
        path = directory / name
        if path.is_file() and path.stat().st_size <= MAX_CONFIG_BYTES:
            files[name] = path.read_bytes()
    return files


def _json_object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        document = strict_json.parse(files.get(name, b"{}"), max_depth=64, max_members=2_000_000)
    except strict_json.StrictJsonError as error:
        raise AssetError(f"{name}: {error}") from None
    if not isinstance(document, dict):
        raise AssetError(f"{name}: a JSON object is expected")
    return document


def _template_of(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    """The template's text: its own file, or the entry of tokenizer_config.json, "default" if there are
    several.
    """
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode("utf-8", "replace")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


async def _start_template(source: str | None, config: dict[str, Any]) -> tuple[ChatTemplate | None, str]:
    if source is None:
        return None, "this model has no chat template"
    constants: dict[str, Any] = {"tools": None, "documents": None}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            constants[name] = value
    try:
        template = ChatTemplate(source, constants)
        await template.start()
    except TemplateError as error:
        log.warning("no chat for this model", reason=str(error))
        return None, str(error)
    return template, ""
