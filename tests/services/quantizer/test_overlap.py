"""Calibration text that holds evaluation text is refused; what two books share by chance is not."""

import random
import re
import textwrap
import unicodedata
from pathlib import Path

import pytest

from services.quantizer.errors import QuantizerError
from services.quantizer.overlap import MIN_SHARED, NGRAM, refuse_overlap
from services.quantizer.texts import (
    BUNDLED_CALIBRATION,
    BUNDLED_EVALUATION,
    TEXT,
    Document,
    TextFile,
    read_files,
)


def file(name, *texts):
    return TextFile(Path(name), TEXT, tuple(Document(n, text) for n, text in enumerate(texts, 1)))


def words(seed, count):
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefgh", k=5)) for _ in range(count))


@pytest.fixture(scope="module")
def bundled():
    return read_files(BUNDLED_CALIBRATION), read_files(BUNDLED_EVALUATION)


def test_the_bundled_texts_do_not_overlap(bundled):
    refuse_overlap(*bundled)


def test_a_copied_paragraph_is_found_whatever_its_wrapping(bundled):
    calibration, held_out = bundled
    paragraph = max(held_out[1].documents[0].text[:20000].split("\n\n"), key=len)
    wrapped = textwrap.fill(paragraph.upper().replace(",", " --"), 40).replace("\n", "\r\n\t")
    mine = file("mine.txt", calibration[0].documents[0].text + wrapped)
    with pytest.raises(QuantizerError) as caught:
        refuse_overlap([calibration[0], mine], held_out)
    message = str(caught.value)
    assert message.startswith(f"mine.txt overlaps the evaluation text {held_out[1].path}: ")
    quote = re.search(r'as in "(.*?)"', message)[1]
    plain = " ".join(re.findall(r"[^\W_]+", paragraph.casefold()))
    assert len(quote.split()) == 12
    assert quote in plain
    assert f"{len(plain.split()) - NGRAM + 1} of its 13986 runs" in message


def test_what_is_shorter_than_the_bound_is_no_overlap():
    common = words(1, NGRAM + MIN_SHARED - 1)
    mine, theirs = words(2, 300) + " ", words(3, 300) + " "
    with pytest.raises(QuantizerError, match=f"{MIN_SHARED} of its"):
        refuse_overlap([file("a", mine + common)], [file("b", theirs + common)])
    short = common.rsplit(" ", 1)[0]
    refuse_overlap([file("a", mine + short)], [file("b", theirs + short)])
    # The same words again are the same words.
    refuse_overlap([file("a", f"{short} | " * 50)], [file("b", f"{theirs} {short} " * 50)])


def test_a_short_evaluation_text_that_is_copied_whole_is_found():
    held_out = words(4, NGRAM + 3)
    with pytest.raises(QuantizerError, match="4 of its 4"):
        refuse_overlap([file("a", words(5, 100) + " " + held_out)], [file("b", held_out)])


def test_runs_do_not_cross_documents():
    text = words(6, 200).split()
    pieces = [" ".join(text[i : i + NGRAM - 1]) for i in range(0, 200, NGRAM - 1)]
    refuse_overlap([file("a", *pieces)], [file("b", " ".join(text))])


def test_runs_cross_the_chunks_in_which_a_long_text_is_read(monkeypatch):
    text = words(7, 400)
    held_out = " ".join(text.split()[100:150])
    for size in (1, 7, 400, 10_000):
        monkeypatch.setattr("services.quantizer.overlap._CHUNK_CHARS", size)
        with pytest.raises(QuantizerError, match="38 of its 38"):
            refuse_overlap([file("a", text)], [file("b", held_out)])


def test_scripts_without_spaces_are_read_letter_by_letter():
    generator = random.Random(8)
    sentence = "".join(chr(generator.randrange(0x4E00, 0x9000)) for _ in range(60))
    with pytest.raises(QuantizerError, match="18 of its 48"):
        refuse_overlap([file("a", "前" + sentence[:30] + "後")], [file("b", sentence)])


def test_conversations_are_compared_by_what_is_said():
    said = words(9, 60)
    talk = {"messages": [{"role": "user", "content": [{"type": "text", "text": said}]}]}
    mine = TextFile(Path("talk.jsonl"), "jsonl", (Document(1, None, talk),))
    with pytest.raises(QuantizerError, match=r"talk\.jsonl overlaps"):
        refuse_overlap([mine], [file("b", said)])


def test_another_encoding_of_the_letters_is_found():
    text = words(5, 200).replace("a", "\u00e9").replace("ff", "\ufb00")
    apart = unicodedata.normalize("NFKD", text)
    assert apart != text
    with pytest.raises(QuantizerError, match="overlaps the evaluation text"):
        refuse_overlap([file("mine.txt", apart)], [file("held.txt", text)])
