"""The checker, the proxy and the schedule themselves: what they must see, and what they must do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tools.chaos.checker import STOP, Expected, StreamCheck, percentile, stopped_at
from tools.chaos.proxy import Proxy

TOKENS = [5, 6, 7, 8, 9]


def fed(*deltas: list[int], reason: str = "LENGTH", usage: int = 5) -> StreamCheck:
    check = StreamCheck("s", [Expected(TOKENS, text="abcde")])
    for number, delta in enumerate(deltas):
        check.on_delta(0, delta, float(number), text="abcde"[5 - len(TOKENS) :] if number == 0 else "")
    check.on_finish(0, reason, usage)
    check.on_end()
    return check


def test_what_is_right_has_no_problem() -> None:
    check = fed([5, 6], [7], [8, 9])
    assert check.problems == []
    assert check.gaps_s == [1.0, 1.0]
    assert check.num_tokens == 5


@pytest.mark.parametrize(
    ("deltas", "lost", "doubled", "wrong"),
    [
        ([[5, 6, 8, 9]], 2, 0, 0),
        ([[5, 6, 6, 7, 8, 9]], 0, 1, 0),
        ([[5, 6, 70, 8, 9]], 0, 0, 1),
        ([[5, 6, 7, 8]], 1, 0, 0),
        ([[5, 6, 7, 8, 9, 10]], 0, 0, 1),
    ],
)
def test_lost_doubled_and_wrong_are_told_apart(
    deltas: list[list[int]], lost: int, doubled: int, wrong: int
) -> None:
    check = fed(*deltas)
    assert (check.num_lost, check.num_doubled, check.num_wrong) == (lost, doubled, wrong)
    assert check.problems


def test_ends_are_checked() -> None:
    assert "ended with STOP" in fed([*TOKENS], reason=STOP).problems[0]
    assert "usage" in fed([*TOKENS], usage=4).problems[0]
    check = fed([*TOKENS])
    check.on_delta(0, [1], 9.0)
    check.on_finish(0, "LENGTH")
    assert check.num_doubled == 2
    unfinished = StreamCheck("s", [Expected(TOKENS)])
    unfinished.on_delta(0, [5], 0.0)
    unfinished.on_error("UNAVAILABLE")
    unfinished.on_end()
    assert unfinished.num_lost == 4
    assert "ended with UNAVAILABLE" in unfinished.problems[0]
    cut = StreamCheck("s", [Expected(TOKENS)])
    cut.on_delta(0, [5], 0.0)
    cut.on_end(may_be_cut=True)
    assert cut.problems == []


def test_text_is_checked() -> None:
    check = StreamCheck("s", [Expected(TOKENS, text="abcde")], has_tokens=False)
    check.on_text(0, "ab", 0.0)
    check.on_text(0, "xde", 0.1)
    assert check.num_wrong == 1
    check = StreamCheck("s", [Expected(TOKENS, STOP, "")], has_tokens=False)
    check.on_finish(0, STOP)
    assert check.problems == []
    check = StreamCheck("s", [Expected(TOKENS, text="abcde")], has_tokens=False)
    check.on_text(0, "ab", 0.0)
    check.on_finish(0, "LENGTH")
    assert check.num_wrong == 1


def test_a_stop_string_is_found_where_it_ends() -> None:
    pieces = [b"ab", b"cd", b"e"]
    assert stopped_at([0, 1, 2, 0], pieces, "bcd") == (2, "a")
    assert stopped_at([0, 1, 2, 0], pieces, "de") == (3, "abc")
    assert stopped_at([0, 1], pieces, "xx") is None
    assert percentile([3, 1, 2], 50) == 2


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_a_proxy_carries_holds_back_slices_and_resets(echo: str) -> None:
    async with Proxy(echo) as proxy, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        proxy.black_hole()
        writer.write(b"kept")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.read(1)
        proxy.heal()
        assert await reader.readexactly(4) == b"kept"
        proxy.slice_bytes = 1
        writer.write(b"x" * 300)
        assert await reader.readexactly(300) == b"x" * 300
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_a_proxy_cuts_a_connection_after_so_many_bytes(echo: str) -> None:
    async with Proxy(echo) as proxy, asyncio.timeout(20):
        proxy.cut_after_bytes = 7
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"0123456789")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(8)
        writer.close()
