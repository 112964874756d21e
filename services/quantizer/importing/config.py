"""What one import was asked to do. Reads no files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.artifact.manifest import is_model_name
from weft.config import REQUIRED, ConfigError, option

RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImportConfig:
    """Flags of `import`."""

    source: Path = option(  # noqa: RUF009 - `option` makes a dataclass field
        REQUIRED, "quantized checkpoint directory (safetensors), or hub id", metavar="DIR|ORG/NAME"
    )
    revision: str | None = option(None, "commit or tag of the hub id", metavar="REV")
    hub_cache: Path | None = option(  # noqa: RUF009
        None, "where hub models are kept; by default the hub client's own", metavar="DIR"
    )
    artifacts: Path = option(REQUIRED, "root of the artifact volume", metavar="DIR")  # noqa: RUF009
    name: str = option(REQUIRED, "model name to publish under")
    allow_requantize: bool = option(False, "round the groups that an artifact cannot hold exactly")
    force: bool = option(False, "import even when CURRENT already holds this")

    def __post_init__(self) -> None:
        if not is_model_name(self.name):
            raise ConfigError("--name", f"{self.name[:80]!r} does not match [a-z0-9][a-z0-9._-]{{0,63}}")

    def recipe(self) -> dict[str, Any]:
        """Everything but the source that decides what the artifact holds."""
        return {
            "version": RECIPE_VERSION,
            "method": "import",
            "bits": 4,
            "allow_requantize": self.allow_requantize,
        }
