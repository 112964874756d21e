"""The rules of the .proto files, read off their compiled descriptors; whether the stubs are fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc_tools")
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"

# Field numbers inside descriptor.proto: the steps of a source_code_info path.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM, MESSAGE_ONEOF = 2, 3, 4, 8
ENUM_VALUE, SERVICE_METHOD = 2, 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    out = tmp_path_factory.mktemp("descriptors") / "all.bin"
    names = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    assert names, "no .proto file"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={out}", *names], check=True)
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def messages(
    nodes: Iterable[Any], path: tuple[int, ...] = (), step: int = FILE_MESSAGE
) -> Iterator[tuple[Any, Any]]:
    """Yield (message, its source path), nested ones too; map entries are the compiler's, not ours."""
    for index, message in enumerate(nodes):
        if not message.options.map_entry:
            here = (*path, step, index)
            yield message, here
            yield from messages(message.nested_type, here, MESSAGE_NESTED)


def enums(file: FileDescriptorProto) -> Iterator[tuple[Any, tuple[int, ...]]]:
    for index, enum in enumerate(file.enum_type):
        yield enum, (FILE_ENUM, index)
    for message, path in messages(file.message_type):
        for index, enum in enumerate(message.enum_type):
            yield enum, (*path, MESSAGE_ENUM, index)


def upper_snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def test_package_is_the_directory_and_ends_in_a_version(files: list[FileDescriptorProto]) -> None:
    for file in files:
        assert file.package.replace(".", "/") == Path(file.name).parent.as_posix(), file.name
        assert re.fullmatch(r"v[1-9]\d*", file.package.rsplit(".", 1)[1]), file.name
        assert file.syntax == "proto3", file.name


def test_services_and_rpcs_are_named_by_the_rules(files: list[FileDescriptorProto]) -> None:
    seen: Counter[str] = Counter()
    for file in files:
        for service in file.service:
            assert service.name.endswith("Service"), service.name
            for method in service.method:
                seen[method.name] += 1
                prefix = f".{file.package}.{method.name}"
                assert (method.input_type, method.output_type) == (f"{prefix}Request", f"{prefix}Response")
    assert seen, "no rpc"
    assert not [name for name, count in seen.items() if count > 1], "rpc names are unique in the package"


def test_enum_values_carry_the_name_and_begin_unspecified(files: list[FileDescriptorProto]) -> None:
    for file in files:
        for enum, _ in enums(file):
            prefix = upper_snake(enum.name)
            assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0), enum.name
            assert all(value.name.startswith(f"{prefix}_") for value in enum.value), enum.name


def test_fields_are_lower_snake_case(files: list[FileDescriptorProto]) -> None:
    wrong = [
        f"{message.name}.{field.name}"
        for file in files
        for message, _ in messages(file.message_type)
        for field in message.field
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name)
    ]
    assert not wrong, wrong


def test_every_sampling_field_tells_unset_from_zero(files: list[FileDescriptorProto]) -> None:
    (params,) = [m for file in files for m, _ in messages(file.message_type) if m.name == "SamplingParams"]
    repeated = params.field[0].LABEL_REPEATED
    bare = [f.name for f in params.field if f.label != repeated and not f.proto3_optional]
    assert not bare, f"a proto3 zero is not a default: {bare}"


def test_everything_has_a_comment(files: list[FileDescriptorProto]) -> None:
    bare: list[str] = []
    for file in files:
        said = {
            tuple(location.path)
            for location in file.source_code_info.location
            if location.leading_comments.strip() or location.trailing_comments.strip()
        }

        def expect(path: tuple[int, ...], name: str, said: set[tuple[int, ...]] = said) -> None:
            if path not in said:
                bare.append(name)

        for i, service in enumerate(file.service):
            expect((FILE_SERVICE, i), service.name)
            for j, method in enumerate(service.method):
                expect((FILE_SERVICE, i, SERVICE_METHOD, j), f"{service.name}.{method.name}")
        for message, path in messages(file.message_type):
            expect(path, message.name)
            for j, field in enumerate(message.field):
                expect((*path, MESSAGE_FIELD, j), f"{message.name}.{field.name}")
        for enum, path in enums(file):
            expect(path, enum.name)
            for j, value in enumerate(enum.value):
                expect((*path, ENUM_VALUE, j), f"{enum.name}.{value.name}")
    assert not bare, f"without a comment: {bare}"


def test_stubs_are_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "generate_stubs.py", tmp_path], check=True)
    stubs = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*_pb2*")}
    checked_in = {
        p.relative_to(ROOT): p.read_bytes() for p in (ROOT / "weft" / "v1").glob("*_pb2*") if p.is_file()
    }
    assert stubs, "nothing was generated"
    assert sorted(stubs) == sorted(checked_in), "run make protos"
    stale = [str(path) for path in stubs if stubs[path] != checked_in[path]]
    assert not stale, f"run make protos: {stale}"
