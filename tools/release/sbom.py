"""One bill of materials for each extra: CycloneDX 1.6 as JSON (https://cyclonedx.org/docs/1.6/json).

Made from what pip would install under the pins: versions, digests of the archives, licences, who needs whom.
The same commit and the same answer of pip give the same bytes. Does not know how packages are found.
"""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from packaging.requirements import Requirement

from tools.release.agreement import package_version
from tools.release.licences import PERMISSIVE, UNUSUAL, expression_of, is_allowed
from tools.release.pins import BROUGHT_BY_TORCH, OWN, normalised, read_report
from tools.release.work import Work

SPEC_VERSION = "1.6"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "weft/sbom")
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1], encoding="utf-8").read())
sys.exit(None if error is None else str(error)[:2000])
"""


def make(work: Work) -> str:
    """Write one for each extra, and hold each to the schema."""
    reports = work.need_reports
    version = package_version(work.checkout)
    counts = []
    for extra, path in reports.items():
        document = bill(read_report(path), extra, version, work.epoch)
        out = work.folder / "dist" / f"weft-{version}-{extra}.cdx.json"
        out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        work.run([work.tool_python, "-c", VALIDATE, out])
        work.made.append(out)
        counts.append(f"{extra} {len(document['components'])}")
    return f"CycloneDX {SPEC_VERSION}, valid: {', '.join(counts)} components"


def bill(report: Mapping[str, Any], extra: str, version: str, epoch: int) -> dict[str, Any]:
    """The document. Packages that a CUDA build of torch brings are left out: they are not pinned here, and
    not on every machine.
    """
    packages = {}
    for item in report["install"]:
        name = normalised(item["metadata"]["name"])
        if not BROUGHT_BY_TORCH.fullmatch(name):
            packages[name] = item
    references = {name: reference(item["metadata"]) for name, item in packages.items() if name != OWN}
    references[OWN] = f"pkg:pypi/{OWN}@{version}"
    content = json.dumps([extra, sorted(references.values()), epoch])
    environment = report["environment"]
    machine = f"{environment['sys_platform']} {environment['platform_machine']}"
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, content)}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                "bom-ref": references[OWN],
                "name": OWN,
                "version": version,
                "purl": references[OWN],
                "licenses": licence_choice("Apache-2.0 AND CC0-1.0"),
            },
            "properties": [
                {"name": "weft:extra", "value": extra},
                {"name": "weft:machine", "value": machine},
                {"name": "weft:python", "value": environment["python_version"]},
            ],
        },
        "components": [
            component(packages[name], references[name]) for name in sorted(packages) if name != OWN
        ],
        "dependencies": [
            {"ref": references[name], "dependsOn": needs(name, extra, packages, references, environment)}
            for name in sorted(packages)
        ],
    }


def reference(metadata: Mapping[str, Any]) -> str:
    """A package URL. A local label (2.13.0+cpu) says which build was at hand and is not part of the pin."""
    return f"pkg:pypi/{normalised(metadata['name'])}@{metadata['version'].partition('+')[0]}"


def component(item: Mapping[str, Any], ref: str) -> dict[str, Any]:
    """One package. The digest is of the archive for the machine that the document names; a build with a local
    label is one of several, so that it has none here.
    """
    metadata = item["metadata"]
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": ref,
        "name": metadata["name"],
        "version": metadata["version"].partition("+")[0],
        "purl": ref,
    }
    if summary := metadata.get("summary"):
        found["description"] = summary
    hashes = item.get("download_info", {}).get("archive_info", {}).get("hashes", {})
    if "sha256" in hashes and "+" not in metadata["version"]:
        found["hashes"] = [{"alg": "SHA-256", "content": hashes["sha256"]}]
    if expression := expression_of(metadata):
        found["licenses"] = licence_choice(expression)
    return found


def licence_choice(expression: str) -> list[dict[str, Any]]:
    """A licence as CycloneDX has it: by its SPDX identifier, as an expression, or in its own words."""
    if expression in PERMISSIVE | UNUSUAL:
        return [{"license": {"id": expression}}]
    try:
        is_allowed(expression)
    except ValueError:
        return [{"license": {"name": expression}}]
    is_expression = re.search(r"\b(AND|OR|WITH)\b", expression)
    return [{"expression": expression}] if is_expression else [{"license": {"name": expression}}]


def needs(
    name: str,
    extra: str,
    packages: Mapping[str, Any],
    references: Mapping[str, str],
    environment: Mapping[str, str],
) -> list[str]:
    """The references of what a package needs, on the machine of the report. Extras that other packages ask
    for are followed where pip has followed them: what is there counts.
    """
    found = set()
    for line in packages[name]["metadata"].get("requires_dist", []):
        requirement = Requirement(line)
        target = normalised(requirement.name)
        values = {**environment, "extra": extra if name == OWN else ""}
        if target in references and (requirement.marker is None or requirement.marker.evaluate(values)):
            found.add(references[target])
    return sorted(found)
