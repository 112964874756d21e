"""Licences, bills of materials and advisories: what is judged from what pip and pip-audit say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.release import audit, licences, sbom
from tools.release.work import Finished, NotRun, StepFailed, Work

OSI = licences.CLASSIFIER
ENVIRONMENT = {
    "implementation_name": "cpython",
    "implementation_version": "3.11.7",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_release": "6",
    "platform_system": "Linux",
    "platform_version": "1",
    "python_full_version": "3.11.7",
    "platform_python_implementation": "CPython",
    "python_version": "3.11",
    "sys_platform": "linux",
}


def item(name: str, version: str, requires: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "version": version, "requires_dist": list(requires), **more},
        "download_info": {"archive_info": {"hashes": {"sha256": "ab" * 32}}},
    }


REPORT = {
    "environment": ENVIRONMENT,
    "install": [
        item("weft", "1.2.3", ("rich>=14", 'torch>=2; extra == "engine"', 'h11; extra == "gateway"')),
        item("rich", "15.0.0", ("Pygments<3", 'ipywidgets; extra == "jupyter"'), license="MIT"),
        item("Pygments", "2.21.0", ('win-only; sys_platform == "win32"',), license_expression="BSD-2-Clause"),
        item("torch", "2.13.0+cpu", ("triton",), license_expression="BSD-3-Clause AND MIT"),
        item("h11", "0.16.0", license="own words, in a sentence"),
        item("triton", "3.6.0", license_expression="MIT"),
    ],
}


@pytest.mark.parametrize(
    ("metadata", "expression", "allowed"),
    [
        ({"license_expression": "MIT"}, "MIT", True),
        ({"license_expression": "MPL-2.0 AND MIT"}, "MPL-2.0 AND MIT", True),
        ({"license_expression": "GPL-3.0-only OR MIT"}, "GPL-3.0-only OR MIT", True),
        ({"license_expression": "GPL-3.0-only AND MIT"}, "GPL-3.0-only AND MIT", False),
        ({"license_expression": "(MIT OR GPL-2.0-only) AND ISC"}, "(MIT OR GPL-2.0-only) AND ISC", True),
        ({"license_expression": "MIT OR GPL-2.0-only AND AGPL-3.0-only"}, None, True),
        ({"license_expression": "Apache-2.0 WITH LLVM-exception"}, None, True),
        ({"license_expression": "GPL-2.0-only WITH LLVM-exception"}, None, False),
        ({"license_expression": "MIT WITH Something-exception"}, None, False),
        ({"license_expression": "(MIT"}, None, False),
        ({"license_expression": "MIT AND"}, None, False),
        ({"license_expression": "MIT ISC"}, None, False),
        ({"classifier": [f"{OSI}BSD License"]}, "BSD-3-Clause", True),
        ({"classifier": [f"{OSI}MIT License", f"{OSI}GNU General Public License v3 (GPLv3)"]}, None, False),
        ({"license": "Apache 2.0"}, "Apache-2.0", True),
        ({"license": "LGPL-3.0-only"}, "LGPL-3.0-only", False),
        ({"license": "NVIDIA Proprietary Software"}, None, False),
        ({}, "no licence named", False),
    ],
)
def test_a_licence_is_read_and_judged(
    metadata: dict[str, Any], expression: str | None, allowed: bool
) -> None:
    found = licences.judge(metadata)
    assert found[0] == allowed
    assert expression is None or found[1] == expression


def work_with(tmp_path: Path, report: dict[str, Any]) -> Work:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    return Work(tmp_path, "HEAD", "", 0.0, reports={"engine": path})


def test_one_refused_licence_fails_the_step(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"1 not allowed or not known\nh11: own words"):
        licences.check(work_with(tmp_path, REPORT))
    fine = {**REPORT, "install": [i for i in REPORT["install"] if i["metadata"]["name"] != "h11"]}
    fine["install"].append(item("tqdm", "4", license_expression="MPL-2.0 AND MIT"))
    assert licences.check(work_with(tmp_path, fine)) == "4 packages; unusual: tqdm (MPL-2.0 AND MIT)"


def test_a_bill_lists_who_needs_whom() -> None:
    bill = sbom.bill(REPORT, "engine", "1.2.3", 1_700_000_000)
    components = {c["name"]: c for c in bill["components"]}
    assert components.keys() == {"rich", "Pygments", "torch", "h11"}, "no triton: torch's build brings it"
    assert components["torch"]["version"] == "2.13.0"
    assert "hashes" not in components["torch"], "one build of several"
    assert components["rich"]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert components["Pygments"]["licenses"] == [{"license": {"id": "BSD-2-Clause"}}]
    assert components["torch"]["licenses"] == [{"expression": "BSD-3-Clause AND MIT"}]
    assert components["h11"]["licenses"] == [{"license": {"name": "own words, in a sentence"}}]
    needs = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert needs["pkg:pypi/weft@1.2.3"] == ["pkg:pypi/rich@15.0.0", "pkg:pypi/torch@2.13.0"]
    assert needs["pkg:pypi/rich@15.0.0"] == ["pkg:pypi/pygments@2.21.0"]
    assert needs["pkg:pypi/torch@2.13.0"] == []
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"


def test_a_bill_is_the_same_again_and_another_for_another_extra() -> None:
    first = sbom.bill(REPORT, "engine", "1.2.3", 1)
    assert sbom.bill(REPORT, "engine", "1.2.3", 1) == first
    assert sbom.bill(REPORT, "gateway", "1.2.3", 1)["serialNumber"] != first["serialNumber"]


def answers(monkeypatch: pytest.MonkeyPatch, **outs: dict[str, Any] | str) -> None:
    """pip-audit's answers by service; a text is what it says when it has none."""

    def run(_: Work, command: list[object], **__: object) -> Finished:
        out = outs[str(command[command.index("--vulnerability-service") + 1])]
        return Finished(1, "", out) if isinstance(out, str) else Finished(1, json.dumps(out), "")

    monkeypatch.setattr(Work, "run", run)


SKIPPED = {
    "dependencies": [{"name": "rich", "skip_reason": "not found"}, {"name": "torch", "skip_reason": "x"}]
}
CLEAN = {"dependencies": [{"name": "rich", "version": "15.0.0", "vulns": []}]}
ADVISORY = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["15.0.1"]}
FOUND = {"dependencies": [{"name": "rich", "version": "15.0.0", "vulns": [ADVISORY]}]}


def test_nobody_to_ask_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, pypi=SKIPPED, osv="x\nrequests.exceptions.ConnectionError: no name")
    with pytest.raises(
        NotRun, match=r"no advisory service \(pypi knows none of 2 packages; osv cannot be reached\)"
    ):
        audit.check(work_with(tmp_path, REPORT))


def test_the_second_service_is_asked_when_the_first_knows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, pypi=SKIPPED, osv=CLEAN)
    assert audit.check(work_with(tmp_path, REPORT)) == "1 pins, no advisory (osv)"


def test_an_advisory_fails_the_step_unless_it_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, pypi=FOUND)
    with pytest.raises(StepFailed, match=r"rich 15\.0\.0: PYSEC-1, fixed in 15\.0\.1"):
        audit.check(work_with(tmp_path, REPORT))
    monkeypatch.setitem(audit.ACCEPTED, "CVE-1", "not reachable")
    assert "no advisory" in audit.check(work_with(tmp_path, REPORT))


def test_half_an_answer_fails_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, pypi={"dependencies": [*CLEAN["dependencies"], *SKIPPED["dependencies"]]})
    with pytest.raises(StepFailed, match="2 of the pins could not be asked for: rich, torch"):
        audit.check(work_with(tmp_path, REPORT))


def test_a_call_that_pip_audit_does_not_take_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, pypi="usage: ...\npip-audit: error: argument -r: not allowed")
    with pytest.raises(StepFailed, match="not allowed"):
        audit.check(work_with(tmp_path, REPORT))
