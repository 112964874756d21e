"""Who asks for help gets it where a pipe reads; who errs, on standard error and with a status."""

from __future__ import annotations

import pytest

from weft.usage import tell_usage

LINE = "usage: python -m x serve [--help | OPTIONS]\n"


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_asked(word, capsys):
    assert tell_usage("python -m x", [word]) == 0
    assert capsys.readouterr() == (LINE, "")


@pytest.mark.parametrize("words", [[], ["srve"], ["srve", "--help"], [""]])
def test_not_asked(words, capsys):
    assert tell_usage("python -m x", words) == 2
    assert capsys.readouterr() == ("", LINE)
