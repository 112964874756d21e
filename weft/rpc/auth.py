"""API keys: hashes compared in constant time, and the file of them read again when it changes.

What the file may say is `weft.rpc.key_file`'s matter. The file never holds a key.
`python -m weft.rpc.auth new NAME [OPTION=VALUE ...]` makes a key and its line; `hash` in place of `new` makes
the line of a key that is read from standard input. Knows no method beyond a caller's metadata.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import grpc

from weft.rpc.errors import StatusError
from weft.rpc.key_file import (
    ANYBODY,
    MAX_KEY_FILE_BYTES,
    OPTION_NAMES,
    Caller,
    KeyFileError,
    parse_key_file,
    parse_options,
)

__all__ = [
    "ANYBODY",
    "MAX_KEY_FILE_BYTES",
    "Authenticator",
    "Caller",
    "KeyFileError",
    "auth_metadata",
    "hash_key",
]

MAX_KEY_CHARS = 512
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def hash_key(key: str) -> str:
    """The SHA-256 of a key, in hex. Keys are random and long, so a plain hash is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Authenticator:
    """Tells whose key a call carries. `reload` puts what the file says now in the place of what it said."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        """`digests`: key name -> SHA-256 in hex, keys that may do anything. Raises KeyFileError when there is
        none.
        """
        if not digests:
            raise KeyFileError("no key in it: every call would be refused")
        self.path: Path | None = None
        self._callers = {digest: Caller(name, key_id=digest[:16]) for name, digest in digests.items()}

    @classmethod
    def from_file(cls, path: Path) -> Authenticator:
        """Read a key file. Raises KeyFileError."""
        found = cls.__new__(cls)
        found.path = path
        found._callers = _read(path)
        return found

    def reload(self) -> None:
        """Read the file again. Raises KeyFileError, and then the keys of before go on."""
        if self.path is not None:
            self._callers = _read(self.path)

    def caller_of(self, key: str) -> Caller | None:
        """Whose key it is, or None. Every digest is compared, so the time says nothing about which one is
        near.
        """
        presented = hash_key(key).encode()
        found: Caller | None = None
        for digest, caller in self._callers.items():
            if hmac.compare_digest(presented, digest.encode()):
                found = caller
        return found

    def name_of(self, key: str) -> str | None:
        """The name of a key, or None."""
        caller = self.caller_of(key)
        return None if caller is None else caller.name

    def renew(self, caller: Caller) -> Caller:
        """The same key as the file has it now: long calls outlive a change of it. Raises
        StatusError(UNAUTHENTICATED) when it is gone.
        """
        for current in self._callers.values():
            if (current.name, current.key_id) == (caller.name, caller.key_id):
                return current
        raise unauthenticated()

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Whose key is in a call's metadata: `authorization: Bearer KEY` or `x-api-key: KEY`, one of
        them once.

        Raises StatusError(UNAUTHENTICATED).
        """
        found = list(credentials_in(metadata))
        if len(found) != 1 or found[0] is None or not 0 < len(found[0]) <= MAX_KEY_CHARS:
            raise unauthenticated()
        caller = self.caller_of(found[0])
        if caller is None:
            raise unauthenticated()
        return caller


def _read(path: Path) -> dict[str, Caller]:
    try:
        with path.open("rb") as file:
            return parse_key_file(file.read(MAX_KEY_FILE_BYTES + 1))
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    except KeyFileError as error:
        raise KeyFileError(f"{path}, {error}") from None


def credentials_in(metadata: Iterable[tuple[str, str | bytes]]) -> Iterable[str | None]:
    """Every credential in the metadata; None stands for one that is malformed."""
    for key, value in metadata:
        name = key.lower()
        if name not in ("authorization", "x-api-key"):
            continue
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if name == "x-api-key":
            yield text
            continue
        scheme, _, credential = text.partition(" ")
        yield credential.strip() if scheme.lower() == "bearer" else None


def unauthenticated() -> StatusError:
    """The one answer to a missing, malformed or wrong key: it does not say which."""
    return StatusError(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong API key", reason="API_KEY_INVALID")


def check_method(caller: Caller, method: str, *, must_be_named: bool = False) -> None:
    """PERMISSION_DENIED for a method that the key does not list. `must_be_named`: a key without a list may
    not call it either.
    """
    if not caller.may_call(method) or (must_be_named and caller.methods is None):
        raise StatusError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"this key may not call {method.rpartition('/')[2][:64]}",
            reason="METHOD_NOT_ALLOWED",
        )


def auth_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What a client adds to a call's metadata."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def main(argv: list[str]) -> int:
    """`new NAME [OPTION=VALUE ...]`: print a new key to standard error and its line to standard output.
    `hash NAME ...`: key from stdin.
    """
    if len(argv) < 2 or argv[0] not in ("new", "hash") or not _NAME.fullmatch(argv[1]):
        options = " ".join(f"[{name}=...]" for name in OPTION_NAMES)
        print(f"usage: python -m weft.rpc.auth (new | hash) NAME {options}", file=sys.stderr)
        return 2
    try:
        parse_options(argv[2:])
    except KeyFileError as error:
        print(error, file=sys.stderr)
        return 2
    if argv[0] == "new":
        key = secrets.token_urlsafe(32)
        print(key, file=sys.stderr)
    else:
        key = sys.stdin.readline().rstrip("\r\n")
        if not 0 < len(key) <= MAX_KEY_CHARS:
            print(f"a key has 1 to {MAX_KEY_CHARS} characters", file=sys.stderr)
            return 2
    print(" ".join([f"{argv[1]}:{hash_key(key)}", *argv[2:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
