"""What is kept of a run: sound or not used, and never another run's."""

import json
import os

import pytest

from services.quantizer.errors import NameBusyError
from services.quantizer.run_lock import LOCK_NAME, RunLock, refuse_if_busy
from services.quantizer.workspace import Workspace, remove_others, remove_own

KEY, IDENTITY = "0123456789abcdef" * 4, "fedcba9876543210" * 4


def add_block(workspace, text):
    tensors = workspace.write_tensors(lambda write: write(f"tensors {text}".encode()))
    workspace.finish_block(
        tensors, f"record {text}".encode(), lambda write: write(f"streams {text}".encode())
    )


@pytest.fixture
def kept(tmp_path):
    """The directory of a run that finished three blocks."""
    with Workspace(tmp_path, KEY, IDENTITY) as workspace:
        assert workspace.resume() == 0
        for text in "abc":
            add_block(workspace, text)
    return workspace.path


def resumed(path):
    workspace = Workspace(path.parent, KEY, IDENTITY)
    number = workspace.resume()
    return number, workspace


def test_finished_blocks_come_back(kept):
    number, workspace = resumed(kept)
    assert number == 3
    assert workspace.streams_path().read_bytes() == b"streams c"
    assert [workspace.record(n) for n in (1, 2, 3)] == [b"record a", b"record b", b"record c"]
    assert workspace.tensors_path(2).read_bytes() == b"tensors b"


def test_only_the_newest_streams_and_their_predecessor_stay(kept):
    names = sorted(name for name in os.listdir(kept) if name.startswith("streams"))
    assert names == ["streams-00002.safetensors", "streams-00003.safetensors"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def link(path):
    os.rename(path, path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("damage", [flip, cut, os.unlink, link])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("block-00003.safetensors", 2),
        ("block-00003.json", 2),
        ("streams-00003.safetensors", 2),
        ("block-00002.safetensors", 0),  # the streams behind block 1 are gone
        ("streams-00002.safetensors", 3),
        ("journal.json", 0),
    ],
)
def test_damage_is_said_and_the_last_sound_block_is_taken(kept, caplog, damage, name, expected):
    if damage is flip and name == "journal.json":
        document = json.loads((kept / name).read_text())
        document["blocks"][2]["streams"]["sha256"] = "../../etc/passwd"
        document["blocks"][2]["streams"]["name"] = "../../etc/passwd"
        (kept / name).write_text(json.dumps(document))
    else:
        damage(kept / name)
    number, workspace = resumed(kept)
    assert number == expected
    is_silent = name == "streams-00002.safetensors" or (damage is os.unlink and name == "journal.json")
    assert ("damaged state" in caplog.text) != is_silent
    left = set(os.listdir(kept))
    if not number:
        assert left == set() or left == {"journal.json"}
    add_block(workspace, "again")
    assert resumed(kept)[0] == number + 1


def test_leftovers_that_no_journal_names_are_removed(kept):
    for name in ("block-00004.safetensors", "streams-00004.safetensors", "journal.json.new", "else"):
        (kept / name).write_bytes(b"torn")
    assert resumed(kept)[0] == 3
    assert not {name for name in os.listdir(kept) if "00004" in name or name in ("journal.json.new", "else")}


def test_a_journal_of_another_run_is_not_read(kept, caplog):
    caplog.set_level("INFO")
    workspace = Workspace(kept.parent, KEY, IDENTITY.replace("f", "e"))
    assert workspace.path == kept
    assert workspace.resume() == 0
    assert "another program" in caplog.text
    assert os.listdir(kept) == []


def test_starting_over_and_leaving_early(kept, tmp_path):
    with Workspace(tmp_path, KEY, IDENTITY):
        pass  # refused before anything was read: what was kept stays
    assert resumed(kept)[0] == 3
    with Workspace(tmp_path, KEY, IDENTITY) as workspace:
        workspace.start_over()
        assert workspace.resume() == 0
    assert not kept.exists()


def test_abandoned_ones_are_removed_and_nothing_else(kept, tmp_path):
    other = tmp_path / ".work-ffffffffffffffff"
    for path in (other, tmp_path / "awq-000000000000", tmp_path / ".work-else"):
        path.mkdir()
    (tmp_path / ".work-eeeeeeeeeeeeeeee").symlink_to(tmp_path / "awq-000000000000")
    remove_others(tmp_path, kept)
    assert sorted(os.listdir(tmp_path)) == [
        ".work-0123456789abcdef",
        ".work-eeeeeeeeeeeeeeee",
        ".work-else",
        "awq-000000000000",
    ]


def test_what_an_ended_publication_left_is_removed_unless_a_run_is_at_work(kept, tmp_path):
    with RunLock(tmp_path):
        remove_own(tmp_path, KEY)
        assert kept.exists()
    remove_own(tmp_path, IDENTITY)
    assert kept.exists()
    remove_own(tmp_path, KEY)
    assert os.listdir(tmp_path) == []


def test_the_second_of_two_is_told_who_holds_the_name(tmp_path):
    directory = tmp_path / "tiny"
    refuse_if_busy(directory)
    with RunLock(directory):
        for attempt in (lambda: RunLock(directory).__enter__(), lambda: refuse_if_busy(directory)):
            with pytest.raises(NameBusyError, match=rf"tiny is at work \(process {os.getpid()} on "):
                attempt()
        (directory / LOCK_NAME).write_text("{")
        with pytest.raises(NameBusyError, match="is at work in"):
            refuse_if_busy(directory)
    refuse_if_busy(directory)
    assert not os.listdir(directory)
    with RunLock(directory), pytest.raises(NameBusyError):
        RunLock(directory).__enter__()


def test_a_lock_file_that_its_holder_left_is_free(tmp_path):
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "host": "gone"}')
    refuse_if_busy(tmp_path)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_lock_that_was_unlinked_meanwhile_is_not_taken_for_the_name_s(tmp_path, monkeypatch):
    import services.quantizer.run_lock as module

    real, calls = module._lock_exclusively, []

    def lock(descriptor):
        real(descriptor)
        if not calls:
            os.unlink(tmp_path / LOCK_NAME)  # as a holder does on leaving
        calls.append(descriptor)

    monkeypatch.setattr(module, "_lock_exclusively", lock)
    with RunLock(tmp_path), pytest.raises(NameBusyError):
        refuse_if_busy(tmp_path)
    assert len(calls) == 2
