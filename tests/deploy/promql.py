"""What an expression of PromQL names: metrics with their labels, and labels by themselves.

Nothing is evaluated; what cannot be read is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

AGGREGATES = {"sum", "max", "min", "avg", "count", "topk", "bottomk", "quantile", "stddev", "group"}
FUNCTIONS = {
    "rate",
    "increase",
    "irate",
    "deriv",
    "delta",
    "histogram_quantile",
    "vector",
    "absent",
    "max_over_time",
}
GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
OPERATORS = {"and", "or", "unless", "bool", "offset"}
_TOKEN = re.compile(
    r"""\s+|(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<range>\[[^\[\]]+\])
    |(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)
    |(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    |(?P<mark>=~|!~|!=|==|>=|<=|[-+*/%^=<>(){},])""",
    re.X,
)


class PromqlError(ValueError):
    """The expression cannot be read."""


@dataclass
class Named:
    """`metrics`: name and label matchers of each selector, in order. `labels`: named in groupings."""

    metrics: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)


def names_in(expression: str) -> Named:
    """Everything an expression names. Raises PromqlError."""
    tokens = _tokens(expression)
    _check_brackets(tokens)
    named = Named()
    place = 0
    while place < len(tokens):
        kind, text = tokens[place]
        following = tokens[place + 1][1] if place + 1 < len(tokens) else ""
        place += 1
        if kind == "mark" and text == "{":
            raise PromqlError(f"labels without a metric: {expression}")
        if kind != "name" or text in OPERATORS:
            continue
        if text in GROUPINGS:
            if following == "(":
                labels, place = _list(tokens, place + 1)
                named.labels |= set(labels)
            elif text not in ("group_left", "group_right"):
                raise PromqlError(f"{text} without labels: {expression}")
        elif following == "(" or (text in AGGREGATES and following in GROUPINGS):
            if text not in AGGREGATES | FUNCTIONS:
                raise PromqlError(f"unknown function {text}")
        else:
            matchers: dict[str, str] = {}
            if following == "{":
                matchers, place = _matchers(tokens, place + 1)
            named.metrics.append((text, matchers))
    return named


def _tokens(expression: str) -> list[tuple[str, str]]:
    tokens, place = [], 0
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None:
            raise PromqlError(f"cannot read {expression[place : place + 20]!r}")
        place = match.end()
        if match.lastgroup is not None:
            tokens.append((match.lastgroup, match[0]))
    return tokens


def _check_brackets(tokens: list[tuple[str, str]]) -> None:
    open_ones: list[str] = []
    for kind, text in tokens:
        if kind != "mark":
            continue
        if text in "({":
            open_ones.append(text)
        elif text in ")}" and (not open_ones or open_ones.pop() + text not in ("()", "{}")):
            raise PromqlError("brackets do not match")
    if open_ones:
        raise PromqlError("brackets do not match")


def _list(tokens: list[tuple[str, str]], place: int) -> tuple[list[str], int]:
    labels = []
    while tokens[place][1] != ")":
        if tokens[place][0] == "name":
            labels.append(tokens[place][1])
        place += 1
    return labels, place + 1


def _matchers(tokens: list[tuple[str, str]], place: int) -> tuple[dict[str, str], int]:
    matchers: dict[str, str] = {}
    while tokens[place][1] != "}":
        if tokens[place][1] == ",":
            place += 1
            continue
        three = tokens[place : place + 3]
        if len(three) < 3:
            raise PromqlError("a matcher has no end")
        (kind, label), (_, operator), (value_kind, value) = three
        if kind != "name" or operator not in ("=", "=~", "!=", "!~") or value_kind != "string":
            raise PromqlError(f"no matcher: {label} {operator} {value}")
        matchers[label] = value[1:-1]
        place += 3
    return matchers, place + 1
