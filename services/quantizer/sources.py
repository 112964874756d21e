"""What --source means: a directory, or a model of the hub with a revision.

Knows how a hub id looks; does not read any model. The hub's client is loaded only when it is needed.
"""

from __future__ import annotations

import re
from pathlib import Path

from services.quantizer.errors import QuantizerError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}\Z")


def local_source(source: Path, revision: str | None, cache: Path | None) -> tuple[Path, str | None]:
    """(directory, commit) to read; the commit is None for a directory. Downloads a hub model that `cache` (by
    default the hub client's own) does not hold. Raises QuantizerError.
    """
    if source.is_dir():
        if revision is not None:
            raise QuantizerError(f"--revision: {source} is a directory, and only models of the hub have one")
        return source, None
    repository = str(source)
    if not _HUB_ID.match(repository) or ".." in repository:
        return source, None  # whoever reads it says what is wrong
    if revision is None:
        raise QuantizerError(
            f"{repository}: no such directory; a model of the hub needs --revision: a commit (40 hex digits) "
            "or a tag, so that the same weights are meant next time"
        )
    if not _REVISION.match(revision) or ".." in revision:
        raise QuantizerError(f"--revision: {revision[:80]!r} is neither a commit nor a tag")
    from services.quantizer import hub

    return hub.fetch(repository, revision, cache)
