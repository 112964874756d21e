"""Where the report of a job goes that missed its gate: <artifacts>/<model>/rejected/<version>/.

The folder holds no manifest, so that no reader of the volume takes it for a version. Knows nothing of what
the pages say. Standard library only.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

FOLDER = "rejected"


def keep_rejected(model_directory: Path, version: str, pages: dict[str, bytes]) -> Path:
    """Write `pages` (name -> bytes), all or nothing; returns their directory. What lay there is replaced."""
    parent = model_directory / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    target, new = parent / version, parent / f".new-{secrets.token_hex(8)}"
    try:
        new.mkdir()
        for name, page in pages.items():
            with (new / name).open("xb") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
        remove_rejected(model_directory, version)
        os.rename(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target


def remove_rejected(model_directory: Path, version: str) -> None:
    """Remove the report of `version`, which was published after all; and the folder, once it is empty."""
    parent = model_directory / FOLDER
    shutil.rmtree(parent / version, ignore_errors=True)
    try:
        parent.rmdir()
    except OSError:
        return  # never made, or it holds others
