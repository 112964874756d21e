"""`python -m services.quantizer import ...`: one artifact, or one line that says why not. Wiring only."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from services.quantizer.config import ENV_PREFIX
from services.quantizer.errors import NameBusyError, QuantizerError
from services.quantizer.importing.config import ImportConfig
from weft import config as weft_config
from weft import logs
from weft.artifact.manifest import ArtifactError

_EXIT_FAILED = 1
_EXIT_BUSY = 4


def main(flags: Sequence[str], prog: str) -> int:
    """Exit status: 0 published or up to date, 1 failed, 2 wrong usage (as SystemExit), 4 another run of this
    name is at work.
    """
    weft_config.let_waiting_threads_sleep()
    config = weft_config.load_config(
        ImportConfig,
        flags,
        prog=prog,
        env_prefix=ENV_PREFIX,
        description="Make an artifact of a checkpoint that is quantized already.",
    )
    logs.start()
    # After the flags, for torch takes seconds to import.
    from services.quantizer.importing.job import run_import
    from weft.artifact.checkpoint import CheckpointError

    try:
        artifact = run_import(config)
    except (QuantizerError, ArtifactError, CheckpointError, OSError, MemoryError) as error:
        logs.stop()  # so that the reason comes last
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {logs.escape(text[:500])}", file=sys.stderr)
        return _EXIT_BUSY if isinstance(error, NameBusyError) else _EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        logs.stop()
    print(artifact.path)
    return 0
