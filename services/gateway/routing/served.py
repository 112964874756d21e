"""What can be asked for now: models, their versions, and how a request's model name finds one.

Knows links by what their engines said of themselves; sends nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc

from services.gateway.links.engine_client import EngineLink
from services.gateway.routing.versions import Variant, VersionWeight, choose, split_name
from services.gateway.text.assets import ModelAssets
from weft.rpc.errors import StatusError
from weft.v1 import engine_service_pb2 as engine_pb

RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """One artifact that engines serve now. `info` is of the engine that takes the longest context."""

    name: str
    version: str
    info: engine_pb.GetInfoResponse
    assets: ModelAssets
    variant: Variant

    @property
    def full_name(self) -> str:
        """model@version; the model's name alone when the version has none."""
        return f"{self.name}@{self.version}" if self.version else self.name


class Catalog:
    """The artifacts behind this gateway. `weights` share a model's requests out among its versions."""

    def __init__(self, weights: Sequence[VersionWeight] = ()) -> None:
        self._weights: dict[str, dict[str, float]] = {}
        for weight in weights:
            self._weights.setdefault(weight.model, {})[weight.version] = weight.share

    def served(self, links: Iterable[EngineLink]) -> list[Served]:
        """Every artifact of these links, by name and version."""
        found: dict[tuple[str, str, str], list[EngineLink]] = {}
        for link in links:
            info = link.info
            if info is not None and link.assets is not None:
                key = (info.model_name, info.artifact_version, info.artifact_digest)
                found.setdefault(key, []).append(link)
        return [_served(key, group) for key, group in sorted(found.items())]

    def find(self, model: str, key: str, usable: Iterable[EngineLink], known: Iterable[EngineLink]) -> Served:
        """The artifact for a request that names `model`, `model@version`, or nothing if there is but one
        model; `key` decides between versions, and an empty one by chance. `known` are all links, up or not:
        their models are away, not unknown. Raises StatusError.
        """
        served = self.served(usable)
        if not model:
            names = {one.name for one in served}
            if len(names) > 1:
                text = "there are several, one must be named"
                raise StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT, f"model: {text}", field_violations=[("model", text)]
                )
            if not names:
                raise no_engine()
            model = names.pop()
        infos = [link.info for link in known if link.info is not None]
        name, version = split_name(model, {info.model_name for info in infos})
        of_model = [one for one in served if one.name == name]
        if version is not None:
            of_model = [one for one in of_model if one.version == version]
        weights = self._weights.get(name, {}) if version is None else {}
        variant = choose([one.variant for one in of_model], weights, key or uuid.uuid4().hex)
        if variant is not None:
            return next(one for one in of_model if one.variant == variant)
        is_known = any(info.model_name == name and version in (None, info.artifact_version) for info in infos)
        if is_known or not infos:
            raise no_engine()
        raise StatusError(
            grpc.StatusCode.NOT_FOUND, f"model {model[:80]!r} is not served here", reason="MODEL_NOT_FOUND"
        )


def is_of(link: EngineLink, model: str) -> bool:
    """Whether what a request names may be what the link's engine serves, or served before it was lost."""
    info = link.info
    return info is not None and model in (
        "",
        info.model_name,
        f"{info.model_name}@{info.artifact_version}",
    )


def no_engine() -> StatusError:
    """No engine can take a request now."""
    return StatusError(
        grpc.StatusCode.UNAVAILABLE, "no engine is ready", retry_after_s=RETRY_S, reason="NO_ENGINE"
    )


def _served(key: tuple[str, str, str], links: Sequence[EngineLink]) -> Served:
    name, version, digest = key
    capacity = sum(min(link.load.max_batch_size, 1 << 16) for link in links)
    best: EngineLink | None = None
    for link in links:
        if link.info is not None and (
            best is None or best.info is None or link.info.max_model_len > best.info.max_model_len
        ):
            best = link
    if best is None or best.info is None or best.assets is None:
        raise ValueError("links without an engine serve nothing")
    return Served(name, version, best.info, best.assets, Variant(name, version, digest, capacity))
