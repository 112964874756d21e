"""Lines of a key file: every option, every way to get one wrong, and a file that changes under a server."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.rpc import auth
from weft.rpc.auth import Authenticator, Caller, KeyFileError, check_method, hash_key
from weft.rpc.errors import StatusError
from weft.rpc.key_file import OPTION_NAMES, parse_key_file

DIGEST = hash_key("first")
ALL = (
    "models=demo,org/other@v2 methods=Generate,ListModels requests_per_second=0.5 tokens_per_minute=10000"
    " max_streams=4 weight=2"
)


def parse(options: str) -> Caller:
    (caller,) = parse_key_file(f"one:{DIGEST} {options}\n".encode()).values()
    return caller


def test_every_option_is_a_field() -> None:
    assert parse(ALL) == Caller(
        "one",
        models=frozenset({"demo", "org/other@v2"}),
        methods=frozenset({"Generate", "ListModels"}),
        requests_per_second=0.5,
        tokens_per_minute=10000.0,
        max_streams=4,
        weight=2.0,
    )
    assert {word.partition("=")[0] for word in ALL.split()} == set(OPTION_NAMES)
    assert parse("") == Caller("one")


def test_what_a_key_allows() -> None:
    caller = parse(ALL)
    assert caller.may_call("Generate")
    assert caller.may_call("/weft.v1.GatewayService/Generate")
    assert not caller.may_call("/weft.v1.GatewayService/Multiplex")
    assert not caller.may_call("/weft.v1.GatewayService/")
    assert caller.may_use("demo", "v1")
    assert caller.may_use("org/other", "v2")
    assert not caller.may_use("org/other", "v1")
    assert not caller.may_use("other", "v2")
    assert Caller("one").may_use("anything", "")
    assert Caller("one").may_call("Anything")
    check_method(caller, "/a.B/Generate")
    for bad, must in ((caller, False), (Caller("one"), True)):
        with pytest.raises(StatusError) as caught:
            check_method(bad, "/a.B/Drain", must_be_named=must)
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "options",
    [
        "secretword",
        "modells=demo",
        "=demo",
        "models",
        "models=",
        "models=a,,b",
        "models=a@",
        "models=a@b@c",
        "models=a models=b",
        "methods=Generate,",
        "methods=/weft.v1.GatewayService/Generate",
        "methods=*",
        "requests_per_second=0",
        "requests_per_second=-1",
        "requests_per_second=nan",
        "requests_per_second=inf",
        "requests_per_second=1e13",
        "requests_per_second=five",
        "tokens_per_minute=",
        "max_streams=0",
        "max_streams=1.5",
        "max_streams=-1",
        "max_streams=٤",
        "max_streams=" + "9" * 10,
        "weight=0",
        "Weight=1",
        "methods=" + ",".join(f"M{i}" for i in range(257)),
        "# no comments at the end",
    ],
)
def test_a_line_that_is_wrong_is_named_and_not_shown(options: str) -> None:
    data = f"# first\nzero:{'0' * 64}\none:{DIGEST} {options}\n".encode()
    with pytest.raises(KeyFileError) as caught:
        parse_key_file(data)
    text = str(caught.value)
    assert text.startswith("line 3: ")
    assert DIGEST not in text
    value = options.partition("=")[2]
    assert not value or value not in text
    assert "secretword" not in text


def test_a_key_stands_once() -> None:
    with pytest.raises(KeyFileError, match="line 2"):
        parse_key_file(f"one:{DIGEST}\ntwo:{DIGEST}\n".encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_keys_or_an_error(data: bytes) -> None:
    try:
        parse_key_file(data)
    except KeyFileError:
        return


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"one:{hash_key('first')} methods=Generate\ntwo:{hash_key('second')}\n")
    keys = Authenticator.from_file(path)
    one, two = keys.caller_of("first"), keys.caller_of("second")
    assert one is not None
    assert two is not None
    path.write_text(f"one:{hash_key('first')} methods=Cancel\ntwo:{hash_key('third')}\n")
    keys.reload()
    assert keys.renew(one).methods == {"Cancel"}
    assert keys.caller_of("second") is None
    with pytest.raises(StatusError) as caught:
        keys.renew(two)  # another key of the same name
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    path.write_text("broken")
    with pytest.raises(KeyFileError):
        keys.reload()
    os.unlink(path)
    with pytest.raises(KeyFileError):
        keys.reload()
    third = keys.caller_of("third")
    assert third is not None
    assert third.name == "two"


def test_the_command_writes_lines_that_the_parser_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert auth.main(["new", "me", *ALL.split()]) == 0
    output = capsys.readouterr()
    ((digest, caller),) = parse_key_file(output.out.encode()).items()
    assert digest == hash_key(output.err.strip())
    assert (caller.name, caller.max_streams) == ("me", 4)
    assert auth.main(["new", "me", "max_streams=many"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "max_streams has a bad value\n")
