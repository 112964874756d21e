"""Text files: plain or JSON lines, told apart, and every bad line named."""

import json
import os

import pytest

from services.quantizer.errors import QuantizerError
from services.quantizer.texts import (
    BUNDLED_CALIBRATION,
    JSON_LINES,
    MAX_TEXT_SIZE,
    TEXT,
    read_files,
    read_texts,
)


@pytest.fixture
def written(tmp_path):
    """written(content, name) -> a file."""

    def write(content, name="a.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


TALK = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [1]}]
}


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", '{"text": "x"}', JSON_LINES),
        ("a.NDJSON", '{"text": "x"}', JSON_LINES),
        ("a", '\n {"text": "x", "id": 1}\n', JSON_LINES),
        ("a.json", json.dumps(TALK) + "\n", JSON_LINES),
        ("a.txt", '{"other": "x"}', TEXT),
        ("a.txt", '{"text": broken', TEXT),
        ("a.txt", "[1]\n", TEXT),
        ("a.md", "words\n", TEXT),
    ],
)
def test_kinds_are_told_by_name_or_first_line(written, name, content, kind):
    assert read_files([written(content, name)])[0].kind == kind


def test_documents_carry_their_lines(written):
    lines = ["", json.dumps({"text": "a\u2028b\nc"}, ensure_ascii=False), "", json.dumps(TALK), ""]
    (file,) = read_files([written("\n".join(lines))], [2.0])
    first, second = file.documents
    assert (first.line, first.text, first.words()) == (2, "a\u2028b\nc", "a\u2028b\nc")
    assert (second.line, second.text) == (4, None)
    assert second.conversation == TALK
    assert second.words() == "Hi\n\n"
    assert file.weight == 2.0


def test_a_byte_order_mark_is_no_text(written):
    assert read_files([written(b"\xef\xbb\xbfwords", "a.txt")])[0].documents[0].text == "words"
    assert read_files([written(b'\xef\xbb\xbf{"text": "words"}')])[0].documents[0].text == "words"


BAD_LINES = {
    "not JSON": ("{broken", "no JSON object"),
    "not an object": ("[1]", "a JSON object is expected, found list"),
    "two equal keys": ('{"text": "a", "text": "b"}', "duplicate key"),
    "neither key": ('{"txt": "a"}', "found neither"),
    "both keys": ('{"text": "a", "messages": []}', "found text and messages"),
    "text a number": ('{"text": 5}', "text is not a text"),
    "text blank": ('{"text": " "}', "text is not a text"),
    "half a pair": ('{"text": "\\ud800"}', "surrogate"),
    "nested deeply": ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "no messages": ('{"messages": []}', "messages is not a list of 1 to"),
    "messages an object": ('{"messages": {}}', "messages is not a list"),
    "a message a text": ('{"messages": ["hi"]}', "messages[0] is not an object"),
    "no role": ('{"messages": [{"content": "a"}]}', "messages[0]: role"),
    "role a number": ('{"messages": [{"role": 1, "content": "a"}]}', "messages[0]: role"),
    "no content": ('{"messages": [{"role": "user"}]}', "messages[0]: content is missing"),
    "content a number": ('{"messages": [{"role": "user", "content": 5}]}', "messages[0]: content is neither"),
    "an image": ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "content is neither"),
    "tools a text": ('{"messages": [{"role": "user", "content": "a"}], "tools": "x"}', "tools is not a list"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(written, case):
    line, reason = BAD_LINES[case]
    path = written('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(QuantizerError) as caught:
        read_files([path])
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_bad_files_are_named(written, tmp_path):
    with pytest.raises(QuantizerError, match=r"a\.txt:2: not UTF-8 at byte 4"):
        read_files([written(b"abc\n\xff", "a.txt")])
    with pytest.raises(QuantizerError, match=r"a\.jsonl: empty"):
        read_files([written(" \n")])
    with pytest.raises(QuantizerError, match=r"none\.txt: no such file"):
        read_files([tmp_path / "none.txt"])
    with pytest.raises(QuantizerError, match="not a regular file"):
        read_files([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QuantizerError, match="not a regular file"):
        read_files([tmp_path / "pipe"])
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(MAX_TEXT_SIZE + 1)
    with pytest.raises(QuantizerError, match=r"huge\.txt: 67108865 bytes"):
        read_files([tmp_path / "huge.txt"])


def test_the_digest_is_of_content_and_kind(written):
    line = '{"text": "x"}'
    first, again = (read_texts([written(line, name)])[1] for name in ("a.jsonl", "b.jsonl"))
    assert first == again
    assert first != read_texts([written('{"text": "y"}')])[1]
    assert (
        read_texts([*BUNDLED_CALIBRATION])[1] != read_texts([*BUNDLED_CALIBRATION, *BUNDLED_CALIBRATION])[1]
    )
    other = '{"other": 1}\n{"text": "x"}'  # the same bytes, but no text file where the name says JSON lines
    assert read_texts([written(other, "c.txt")])[1] != read_texts([written(other, "c.jsonl")])[1]
