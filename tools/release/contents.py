"""What is in the wheel and in the source archive: everything that runs, and nothing that is for developers.

Reads names and metadata. Does not know how the archives were made.
"""

from __future__ import annotations

import email.parser
import email.policy
import re
import tarfile
import zipfile
from collections.abc import Iterable

from tools.release.agreement import package_version
from tools.release.work import EXTRAS, StepFailed, Work

PACKAGES = ("cli", "services", "weft")
MAX_WHEEL_BYTES = 16_000_000
# Where the wheel has what lies elsewhere in the checkout.
MOVED = {"models/demo/": "cli/demo/model/", "protos/weft/": "weft/protos/weft/"}
# Of the packages' folders, what is not for users.
LEFT_OUT = re.compile(r"(^|/)(Dockerfile[^/]*|README\.md)$")
ALWAYS = ("weft/py.typed", "weft/v1/generation_pb2.pyi", "cli/demo/model/model.safetensors")
OF_THE_SOURCES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
)
NOT_FOR_USERS = re.compile(r"(^|/)(tests?|tools|benchmarks|__pycache__|\.[^/]+)(/|$)|\.py[cod]$")
# Its three top-level names are the import paths of the sources; see the decision record on the release.
KNOWN_TO_CHECK_WHEEL_CONTENTS = "W005,W009"


def check(work: Work) -> str:
    """Read both archives, and let twine and check-wheel-contents read them too."""
    wheel, sdist = work.need_wheel, work.sdist or work.need_wheel
    listed = work.run(["git", "ls-files", "-z"], cwd=work.checkout).out.split("\0")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        (entries_name,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        metadata, entries = archive.read(metadata_name).decode(), archive.read(entries_name).decode()
    with tarfile.open(sdist) as packed:
        sources = [name.partition("/")[2] for name in packed.getnames()]
    problems = wheel_problems(names, listed) + source_problems(sources, listed)
    problems += metadata_problems(metadata, package_version(work.checkout))
    if "weft = cli.__main__:main" not in entries:
        problems.append("the wheel has no `weft` command")
    if (size := wheel.stat().st_size) > MAX_WHEEL_BYTES:
        problems.append(f"the wheel has {size} bytes, more than {MAX_WHEEL_BYTES}")
    if problems:
        raise StepFailed(f"{len(problems)} wrong\n" + "\n".join(problems[:30]))
    work.run([work.tool_python, "-m", "twine", "check", "--strict", wheel, sdist])
    tool = work.tool_python.with_name("check-wheel-contents")
    work.run([tool, "--ignore", KNOWN_TO_CHECK_WHEEL_CONTENTS, wheel])
    return f"{len(names)} files in the wheel, {len(sources)} in the source archive; twine finds no fault"


def expected_files(listed: Iterable[str]) -> set[str]:
    """What the wheel must hold of the files that git knows, under the wheel's names."""
    expected = set()
    for name in listed:
        if name.partition("/")[0] in PACKAGES and not LEFT_OUT.search(name):
            expected.add(name)
        for folder, place in MOVED.items():
            if name.startswith(folder):
                expected.add(place + name.removeprefix(folder))
    return expected


def wheel_problems(names: Iterable[str], listed: Iterable[str]) -> list[str]:
    """What is missing in a wheel and what should not be there."""
    present = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    expected = expected_files(listed)
    problems = [f"not in the wheel: {name}" for name in sorted((expected | set(ALWAYS)) - present)]
    extra = {name for name in present - expected if not LEFT_OUT.search(name)}
    problems += [f"in the wheel, and not from git: {name}" for name in sorted(extra)]
    problems += [f"not for users: {name}" for name in sorted(present) if NOT_FOR_USERS.search(name)]
    if not any(re.search(r"\.dist-info/licenses/LICENSE$", name) for name in names):
        problems.append("the wheel has no licence")
    return problems


def source_problems(names: Iterable[str], listed: Iterable[str]) -> list[str]:
    """What is missing in a source archive (names without its first folder) and what should not be there."""
    present = set(names)
    wanted = {name for name in listed if name.startswith((*PACKAGES, *MOVED)) and not LEFT_OUT.search(name)}
    wanted = {name for name in wanted if name.partition("/")[0] in (*PACKAGES, "models", "protos")}
    problems = [f"not in the source archive: {n}" for n in sorted((wanted | set(OF_THE_SOURCES)) - present)]
    return problems + [f"not for users: {name}" for name in sorted(present) if NOT_FOR_USERS.search(name)]


def metadata_problems(text: str, version: str) -> list[str]:
    """What is wrong in a wheel's METADATA."""
    message = email.parser.Parser(policy=email.policy.default).parsestr(text)
    wanted = {"Name": "weft", "Version": version, "Requires-Python": ">=3.11"}
    problems = [
        f"{key} is {message[key]}, not {value}" for key, value in wanted.items() if message[key] != value
    ]
    if not str(message["License-Expression"] or "").startswith("Apache-2.0"):
        problems.append(f"License-Expression is {message['License-Expression']}")
    offered = set(message.get_all("Provides-Extra") or [])
    problems += [f"no extra {name}" for name in EXTRAS if name not in offered]
    bare = [line for line in message.get_all("Requires-Dist") or [] if "extra ==" not in line]
    heavy = [line for line in bare if re.match(r"(torch|transformers|numpy|ray|starlette)\b", line)]
    return problems + [f"needed without any extra: {line}" for line in heavy]
