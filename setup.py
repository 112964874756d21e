"""What pyproject.toml cannot say: packages whose files lie elsewhere in the checkout, and a source archive
whose bytes follow from the files in it alone. All else about the package is in pyproject.toml.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

# Their folders stand in pyproject.toml, below [tool.setuptools.package-dir].
ELSEWHERE = ["cli.demo.model", "weft.protos"]


class Sdist(sdist):
    """With SOURCE_DATE_EPOCH, every time in the archive is that one, and no name or mode is the builder's."""

    def make_archive(self, *args: Any, **kwargs: Any) -> str:
        """The archive's path, as setuptools has it."""
        path: str = super().make_archive(*args, **kwargs)
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch and path.endswith(".tar.gz"):
            rewrite(Path(path), int(epoch))
        return path


def rewrite(path: Path, epoch: int) -> None:
    """Write the archive again: members in the order of their names, owned by nobody, all of one time."""
    with tarfile.open(path) as archive:
        files = [(m, archive.extractfile(m)) for m in archive.getmembers() if m.isfile()]
        contents = [(m.name, m.mode, source.read()) for m, source in files if source is not None]
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, mode, data in sorted(contents):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(data), epoch, 0o755 if mode & 0o100 else 0o644
            archive.addfile(member, io.BytesIO(data))


setup(
    packages=[
        *find_packages(include=["weft", "weft.*", "services", "services.*", "cli", "cli.*"]),
        *ELSEWHERE,
    ],
    cmdclass={"sdist": Sdist},
)
