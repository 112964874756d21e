"""How much memory this process uses and may still use. Linux; standard library only.

Knows the kernel's files, and nothing of what the memory is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 60


def used_bytes(root: Path = Path("/")) -> int:
    """Resident memory of this process, 0 where the kernel does not say."""
    return _status_bytes(root, "VmRSS")


def peak_bytes(root: Path = Path("/")) -> int:
    """The most that was resident at once, 0 where the kernel does not say."""
    return _status_bytes(root, "VmHWM")


def available_bytes(root: Path = Path("/")) -> int | None:
    """What this process may take on top of what it has: of the machine's memory, and of every control group
    that it is in. None where the kernel does not say.
    """
    found = [value for value in (_machine(root), *_groups(root)) if value is not None]
    return max(0, min(found)) if found else None


def _status_bytes(root: Path, key: str) -> int:
    return _table(root / "proc/self/status").get(f"{key}:", 0)


def _machine(root: Path) -> int | None:
    return _table(root / "proc/meminfo").get("MemAvailable:")


def _groups(root: Path) -> Iterator[int | None]:
    """Headroom of the groups from this process's own to the root, of both versions of control groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            for group in _upwards(root / "sys/fs/cgroup", path):
                yield _headroom(group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for group in _upwards(root / "sys/fs/cgroup/memory", path):
                yield _headroom(
                    group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                )


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _headroom(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """What the group's limit leaves; files that are only cached give way and count as free."""
    try:
        limit = int((group / limit_name).read_text())  # "max" is no number: no limit
        usage = int((group / usage_name).read_text())
    except (OSError, ValueError):
        return None
    if limit >= _UNLIMITED:
        return None
    return limit - max(0, usage - _table(group / "memory.stat").get(cache_name, 0))


def _table(path: Path) -> dict[str, int]:
    """`name number [kB]` lines as bytes."""
    table: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, *rest = line.split()
            if rest and rest[0].isdigit():
                table[name] = int(rest[0]) * (1024 if rest[-1] == "kB" else 1)
    return table
