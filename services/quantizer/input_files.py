"""The files that a run reads, as they are when it begins: so that it can say in the end that what it read is
what its digests are of.

A file counts as the same while device, inode, size and time of change are. Standard library only. Knows
nothing of what the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from services.quantizer.companions import COMPANION_NAMES
from services.quantizer.config import QuantizerConfig, split_weight
from services.quantizer.errors import QuantizerError
from weft.artifact.regular_file import FileIdentity


@dataclass(frozen=True, slots=True)
class InputFiles:
    """Identities by path; a file that is not there is not in it."""

    directory: Path
    texts: tuple[Path, ...]
    identities: dict[Path, FileIdentity]

    @classmethod
    def of(cls, config: QuantizerConfig) -> InputFiles:
        """As they are now. Complains of nothing: whoever reads them will."""
        texts = (*(split_weight(path)[0] for path in config.calibration), *config.evaluation)
        return cls(config.source, texts, _identities(config.source, texts))

    @classmethod
    def of_directory(cls, directory: Path) -> InputFiles:
        """Those of a checkpoint alone."""
        return cls(directory, (), _identities(directory, ()))

    def check(self) -> None:
        """Raises QuantizerError naming the first file that is not as it was, was not there or is gone."""
        now = _identities(self.directory, self.texts)
        for path in sorted(now.keys() | self.identities.keys()):
            if now.get(path) != self.identities.get(path):
                raise QuantizerError(f"{path}: changed during the run")


def _identities(directory: Path, texts: Iterable[Path]) -> dict[Path, FileIdentity]:
    found: dict[Path, FileIdentity] = {}
    weights = directory.glob("*.safetensors*")
    names = (directory / name for name in ("config.json", *COMPANION_NAMES))
    for path in (*weights, *names, *texts):
        try:
            status = os.stat(path)
        except OSError:
            continue
        found[path] = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return found
