"""Tokens by key, with a bound on names."""

from __future__ import annotations

from services.gateway.admission.usage import ANONYMOUS, OTHERS, KeyTokens, KeyUsage


def test_tokens_add_up_by_key() -> None:
    usage = KeyUsage()
    usage.add("a", 10, 5)
    usage.add("a", 1, 2)
    usage.add(None, 7, 0)
    assert dict(usage.items()) == {"a": KeyTokens(11, 7), ANONYMOUS: KeyTokens(7, 0)}


def test_names_are_bounded() -> None:
    usage = KeyUsage(max_names=2)
    for name in ("a", "b", "c", "d", "a"):
        usage.add(name, 1, 1)
    assert dict(usage.items()) == {"a": KeyTokens(2, 2), "b": KeyTokens(1, 1), OTHERS: KeyTokens(2, 2)}
