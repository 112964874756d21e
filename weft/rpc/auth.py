"""API keys: a file of hashes, compared in constant time. Knows no method beyond a caller's metadata.

A line of the file is `name:sha256hex`; blank lines and lines that begin with `#` are skipped. The file
never holds a key. `python -m weft.rpc.auth new NAME` makes a key and its line; `python -m weft.rpc.auth
hash NAME` hashes a key that is read from standard input.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc

from weft.rpc.errors import StatusError

MAX_KEY_CHARS = 512
MAX_KEY_FILE_BYTES = 1 << 20
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeyFileError(ValueError):
    """An API key file that cannot be used. Names the line, never what it holds."""


def hash_key(key: str) -> str:
    """The SHA-256 of a key, in hex. Keys are random and long, so a plain hash is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what the key allows. `name` None: the server asks for no keys.

    `models` and `methods` None allow all; a method is its bare name, as in "Generate". The limits of None do
    not limit. `weight` is the share of the key among the others when requests must wait.
    """

    name: str | None = None
    models: frozenset[str] | None = None
    methods: frozenset[str] | None = None
    requests_per_second: float | None = None
    tokens_per_minute: float | None = None
    max_streams: int | None = None
    weight: float = 1.0


ANYBODY = Caller()


class Authenticator:
    """Tells whose key a call carries. Immutable; a new file needs a new one."""

    def __init__(self, digests: dict[str, str]) -> None:
        """`digests`: key name -> SHA-256 in hex. Raises KeyFileError when there is none."""
        if not digests:
            raise KeyFileError("no key in it: every call would be refused")
        self._digests = dict(digests)

    @classmethod
    def from_file(cls, path: Path) -> Authenticator:
        """Read a key file. Raises KeyFileError."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise KeyFileError(f"{path}: {error.strerror}") from error
        if len(data) > MAX_KEY_FILE_BYTES:
            raise KeyFileError(f"{path}: larger than {MAX_KEY_FILE_BYTES} bytes")
        digests: dict[str, str] = {}
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise KeyFileError(f"{path}, line {number}: not `name:sha256hex`")
            if match[1] in digests:
                raise KeyFileError(f"{path}, line {number}: the name {match[1]} is there already")
            digests[match[1]] = match[2]
        try:
            return cls(digests)
        except KeyFileError as error:
            raise KeyFileError(f"{path}: {error}") from error

    def name_of(self, key: str) -> str | None:
        """The name of a key, or None. Every digest is compared, so the time says nothing about which one is
        near.
        """
        presented = hash_key(key).encode()
        found: str | None = None
        for name, digest in self._digests.items():
            if hmac.compare_digest(presented, digest.encode()):
                found = name
        return found

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Whose key is in a call's metadata: `authorization: Bearer KEY` or `x-api-key: KEY`, one of
        them once.

        Raises StatusError(UNAUTHENTICATED).
        """
        found = list(credentials_in(metadata))
        if len(found) != 1 or found[0] is None or not 0 < len(found[0]) <= MAX_KEY_CHARS:
            raise unauthenticated()
        name = self.name_of(found[0])
        if name is None:
            raise unauthenticated()
        return Caller(name)


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


def auth_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What a client adds to a call's metadata."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def main(argv: list[str]) -> int:
    """`new NAME`: print a new key to standard error and its line to standard output. `hash NAME`: key from
    stdin.
    """
    if len(argv) != 2 or argv[0] not in ("new", "hash") or not _NAME.fullmatch(argv[1]):
        print("usage: python -m weft.rpc.auth (new | hash) NAME", file=sys.stderr)
        return 2
    if argv[0] == "new":
        key = secrets.token_urlsafe(32)
        print(key, file=sys.stderr)
    else:
        key = sys.stdin.readline().rstrip("\r\n")
        if not 0 < len(key) <= MAX_KEY_CHARS:
            print(f"a key has 1 to {MAX_KEY_CHARS} characters", file=sys.stderr)
            return 2
    print(f"{argv[1]}:{hash_key(key)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
