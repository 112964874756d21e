"""Whether an advisory is known for a pinned version: pip-audit asks PyPI's service, and then OSV's.

Where neither can be asked, the answer is that nobody was asked: pip-audit itself ends well then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tools.release.work import Finished, NotRun, StepFailed, Work

SERVICES = ("pypi", "osv")
# What pip-audit says when it cannot speak to a service; anything else is a fault of the call.
UNREACHABLE = re.compile(
    r"\b(ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|NameResolutionError)\b"
)
# Advisories that were looked at and do not apply, with the reason beside each.
ACCEPTED: dict[str, str] = {}


def check(work: Work) -> str:
    """Audit constraints.txt."""
    reasons = []
    for service in SERVICES:
        command = [
            work.tool_python,
            "-m",
            "pip_audit",
            "--vulnerability-service",
            service,
            "--format",
            "json",
        ]
        flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "15"]
        done = work.run([*command, *flags, "-r", work.constraints], expect=None)
        answer = read_answer(done)
        if answer is None:
            if not UNREACHABLE.search(done.err):
                raise StepFailed(f"pip-audit ended with {done.code}\n{done.tail()}")
            reasons.append(f"{service} cannot be reached")
            continue
        checked, unknown, findings = sort_out(answer)
        if not checked:
            reasons.append(f"{service} knows none of {len(unknown)} packages")
            continue
        if findings:
            raise StepFailed(f"{len(findings)} advisories\n" + "\n".join(findings))
        if unknown:
            raise StepFailed(f"{len(unknown)} of the pins could not be asked for: {', '.join(unknown)}")
        return f"{checked} pins, no advisory ({service})"
    raise NotRun(f"no advisory service ({'; '.join(reasons)})")


def read_answer(done: Finished) -> dict[str, Any] | None:
    """pip-audit's JSON; None where it failed before it had any."""
    try:
        answer = json.loads(done.out)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("dependencies"), list) else None


def sort_out(answer: Mapping[str, Any]) -> tuple[int, list[str], list[str]]:
    """How many packages were looked up, the names of those that were not, and a line for each advisory."""
    checked, unknown, findings = 0, [], []
    for package in answer["dependencies"]:
        if "skip_reason" in package:
            unknown.append(str(package["name"]))
            continue
        checked += 1
        for advisory in package.get("vulns", []):
            known = {advisory["id"], *advisory.get("aliases", [])}
            if not known & ACCEPTED.keys():
                fixed = ", ".join(advisory.get("fix_versions", [])) or "no version yet"
                findings.append(f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    return checked, unknown, findings
