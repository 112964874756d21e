"""`python -m services.quantizer run ...`: one artifact, or one line that says why not. `... import` makes one
of a checkpoint that is quantized already, `... export` rewrites one in another format, `... serve` is the
job service. Wiring only.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from services.quantizer.config import ENV_PREFIX, PATH_SEPARATOR, QuantizerConfig
from services.quantizer.errors import GateMissed, NameBusyError, QuantizerError
from services.quantizer.identity import draft_key, draft_manifest, find_current
from services.quantizer.input_files import InputFiles
from services.quantizer.run_lock import refuse_if_busy
from services.quantizer.sources import local_source
from services.quantizer.workspace import remove_own
from weft import config as weft_config
from weft import logs
from weft.artifact.manifest import ArtifactError
from weft.artifact.publish import claim_fence
from weft.artifact.store import Artifact, ArtifactStore
from weft.extras import said_in_one_line

_PROGRAM = "python -m services.quantizer"
_COMMANDS = ("run", "import", "export", "serve")
_LIST_FLAGS = ("--calibration", "--evaluation")
_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_GATE_MISSED = 3
_EXIT_BUSY = 4
_STOPPED = "stopped: nothing was published; the same command goes on from the last finished block"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 published, up to date or served; 1 failed; 2 wrong usage (as SystemExit); 3 worse than
    the gate allows; 4 another run of this name is at work.
    """
    command, *flags = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if command in ("-h", "--help"):
        print(f"usage: {_PROGRAM} {{{','.join(_COMMANDS)}}} ... (each takes --help)")
        return 0
    if command not in _COMMANDS:
        print(f"{_PROGRAM}: the first word must be one of: {', '.join(_COMMANDS)}", file=sys.stderr)
        return _EXIT_USAGE
    prog = f"{_PROGRAM} {command}"
    if command == "serve":
        from services.quantizer import serve  # it alone needs grpc

        return serve.main(flags, prog)
    signal.signal(signal.SIGTERM, _terminate)
    if command == "import":
        from services.quantizer.importing import command as importing

        return importing.main(flags, prog)
    if command == "export":
        from services.quantizer import exporting

        return exporting.main(flags, prog)
    weft_config.let_waiting_threads_sleep()
    config = weft_config.load_config(QuantizerConfig, join_lists(flags), prog=prog, env_prefix=ENV_PREFIX)
    logs.start()
    try:
        return _run(config)
    finally:
        logs.stop()


def join_lists(flags: Sequence[str]) -> list[str]:
    """`--calibration A B --calibration C` as `--calibration A:B:C`, the form that a variable takes too."""
    others: list[str] = []
    lists: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in flags:
        name, equals, value = word.partition("=")
        if name in _LIST_FLAGS:
            values = lists.setdefault(name, [])
            if equals:
                values.append(value)
        elif values is not None and not word.startswith("-"):
            values.append(word)
        else:
            values = None
            others.append(word)
    for name, values in lists.items():
        # Nothing after a name is the parser's to complain about.
        others += [name, PATH_SEPARATOR.join(values)] if values else [name]
    return others


def _run(config: QuantizerConfig) -> int:
    try:
        artifact = _quantize(config)
    except (QuantizerError, ArtifactError, OSError, MemoryError) as error:
        logs.stop()  # so that the reason comes last
        text = " ".join(str(error).split()) or type(error).__name__
        # A template's or a file's own words may be in it.
        print(f"error: {logs.escape(text[:500])}", file=sys.stderr)
        return _exit_status(error)
    except (KeyboardInterrupt, SystemExit) as stop:  # SystemExit is SIGTERM's
        logs.stop()
        print(_STOPPED, file=sys.stderr)
        return 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    logs.stop()
    print(artifact.path)
    for line in _quality_lines(artifact.manifest.quality):
        print(line)
    return 0


def _exit_status(error: BaseException) -> int:
    if isinstance(error, NameBusyError):
        return _EXIT_BUSY
    return _EXIT_GATE_MISSED if isinstance(error, GateMissed) else _EXIT_FAILED


def _quantize(config: QuantizerConfig) -> Artifact:
    if config.fencing_token is not None:
        # From here on, not only at the end: whoever lost the lease to this run publishes nothing any more.
        claim_fence(ArtifactStore(config.artifacts), config.name, config.fencing_token)
    directory = ArtifactStore(config.artifacts).model_directory(config.name)
    refuse_if_busy(directory)
    source, commit = local_source(config.source, config.revision, config.hub_cache)
    config = dataclasses.replace(config, source=source, revision=commit)
    files = InputFiles.of(config)
    draft = draft_manifest(config)
    current = None if config.force else find_current(config, draft)
    if current is not None:
        logs.get_logger("quantizer").info("up to date", model=config.name, version=current.version)
        remove_own(directory, draft_key(draft))
        return current
    # torch and transformers take seconds to import: not before it is known that they are needed.
    from services.quantizer.job import run
    from weft.artifact.checkpoint import CheckpointError

    logs.get_logger("quantizer").info("quantizing", **weft_config.effective(config))
    try:
        return run(config, draft, files)
    except CheckpointError as error:
        raise QuantizerError(str(error)) from error
    except RuntimeError as error:
        # torch has no class of its own for a machine without memory left.
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise QuantizerError(f"out of memory: {error}") from error


def _quality_lines(quality: dict[str, dict[str, float]] | None) -> list[str]:
    if quality is None:
        return []
    return [
        f"{variant:8} " + "  ".join(f"{key} {value:.6g}" for key, value in quality[variant].items())
        for variant in ("source", "rounding", "chosen")
    ]


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds through staging area and workspace


if __name__ == "__main__":
    with said_in_one_line("quantizer", _PROGRAM):
        sys.exit(main())
