"""Key files, and what counts as a credential."""

from __future__ import annotations

import io

import grpc
import pytest

from weft.rpc import auth
from weft.rpc.auth import Authenticator, KeyFileError, hash_key
from weft.rpc.errors import StatusError

KEYS = Authenticator({"one": hash_key("first"), "two": hash_key("second")})


def test_a_key_has_a_name():
    assert KEYS.name_of("first") == "one"
    assert KEYS.name_of("second") == "two"
    assert KEYS.name_of("third") is None
    assert KEYS.name_of(hash_key("first")) is None


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ([("authorization", "Bearer first")], "one"),
        ([("authorization", "bearer  second ")], "two"),
        ([("Authorization", "BEARER first")], "one"),
        ([("x-api-key", "first"), ("x-other", "second")], "one"),
        ([("x-api-key", b"first")], "one"),
        ([], None),
        ([("authorization", "first")], None),
        ([("authorization", "Basic first")], None),
        ([("authorization", "Bearer")], None),
        ([("authorization", "Bearer first"), ("authorization", "Bearer first")], None),
        ([("authorization", "Bearer first"), ("x-api-key", "first")], None),
        ([("authorization", "Basic x"), ("x-api-key", "first")], None),
        ([("x-api-key", "")], None),
        ([("x-api-key", "a" * 70_000)], None),
        ([("x-api-key", b"\xff\xfe")], None),
    ],
)
def test_credentials(metadata, name):
    if name is not None:
        assert KEYS.authenticate(metadata).name == name
        return
    with pytest.raises(StatusError) as caught:
        KEYS.authenticate(metadata)
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.message == "missing or wrong API key"


def test_every_digest_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append(b) or a == b)
    KEYS.name_of("first")
    assert len(compared) == 2


def test_a_key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n  one:{hash_key('first')}  \ntwo:{hash_key('second')}\n")
    assert Authenticator.from_file(path).name_of("second") == "two"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "first\n",
        "one:first\n",
        "one:" + "A" * 64 + "\n",
        ":" + "a" * 64 + "\n",
        "a b:" + "a" * 64 + "\n",
        ("one:" + "a" * 64 + "\n") * 2,
        "x" * (auth.MAX_KEY_FILE_BYTES + 1),
    ],
    ids=range(9),
)
def test_a_key_file_that_cannot_be_used_is_refused_without_saying_what_it_holds(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        Authenticator.from_file(path)
    assert str(path) in str(caught.value)
    assert "a" * 64 not in str(caught.value)
    with pytest.raises(KeyFileError):
        Authenticator.from_file(tmp_path / "missing")


def test_a_new_key_and_its_line(capsys, tmp_path, monkeypatch):
    assert auth.main(["new", "me"]) == 0
    output = capsys.readouterr()
    path = tmp_path / "keys"
    path.write_text(output.out)
    key = output.err.strip()
    assert len(key) >= 40
    assert Authenticator.from_file(path).name_of(key) == "me"
    monkeypatch.setattr("sys.stdin", io.StringIO(key + "\n"))
    assert auth.main(["hash", "me"]) == 0
    assert capsys.readouterr().out == output.out


@pytest.mark.parametrize("argv", [[], ["new"], ["new", "a b"], ["old", "me"], ["new", "me", "x"]])
def test_wrong_usage(argv):
    assert auth.main(argv) == 2
