"""Which models a key may use, and which it means. Pure; knows names and versions, not what serves them."""

from __future__ import annotations

from collections.abc import Collection

import grpc

from weft.rpc.auth import Caller
from weft.rpc.errors import StatusError


def meant_model(caller: Caller, model: str, known: Collection[tuple[str, str]]) -> str:
    """The model of a request of this key: `model` itself, or what is left of it for a key that may use less.

    `known` are (name, version) of the models behind this gateway. Whether a model that the key may not use
    exists is not told. Raises StatusError(PERMISSION_DENIED).
    """
    if caller.models is None:
        return model
    name, at, version = model.partition("@")
    if not model:
        usable = {name for name, version in known if caller.may_use(name, version)}
        if len(usable) != 1:
            return model  # several: the router asks for a name; none: nothing that is found will be allowed
        (name,) = usable
    if at:
        if not caller.may_use(name, version):
            raise not_allowed(model)
        return model
    if name in caller.models:
        return name
    versions = [entry for entry in sorted(caller.models) if entry.partition("@")[0] == name]
    here = [entry for entry in versions if tuple(entry.split("@")) in known] or versions
    if len(here) != 1:
        raise not_allowed(model)
    return here[0]


def check_model(caller: Caller, name: str, version: str) -> None:
    """PERMISSION_DENIED for a version of a model that the key may not use."""
    if not caller.may_use(name, version):
        raise not_allowed(name)


def not_allowed(model: str) -> StatusError:
    """The answer for a model that a key may not use, served here or not."""
    text = f"model {model[:80]!r}" if model else "the model"
    return StatusError(
        grpc.StatusCode.PERMISSION_DENIED, f"this key may not use {text}", reason="MODEL_NOT_ALLOWED"
    )
