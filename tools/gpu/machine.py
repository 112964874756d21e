"""What the rows were measured on: device, versions, commit. Asks torch in a process of its own, so that this
one needs neither torch nor a device.
"""

from __future__ import annotations

import json
import subprocess
import sys

_ASK = """
import json, platform, torch
names = {"python": platform.python_version(), "torch": torch.__version__}
for name in ("triton", "transformers", "numpy"):
    try:
        names[name] = __import__(name).__version__
    except Exception as error:
        names[name] = "missing: " + type(error).__name__
names["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
print(json.dumps(names))
"""


def machine_facts(git_sha: str | None) -> dict[str, str]:
    """{"device": ..., "git": ..., "torch": ..., ...}. Raises RuntimeError where torch does not import."""
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"torch does not import: {done.stderr.strip().splitlines()[-1:]}")
    facts: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return {"device": facts.pop("device"), "git": git_sha or _commit(), **facts}


def _commit() -> str:
    """The short commit, with "-dirty" when tracked files differ; "unknown" where there is no repository."""
    asked = ["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "-uno"]
    try:
        sha, changes = (subprocess.run(a, capture_output=True, text=True, check=True).stdout for a in asked)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha.strip() + ("-dirty" if changes.strip() else "")
