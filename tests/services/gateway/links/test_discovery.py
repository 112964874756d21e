"""Engines by list, name or file, and what happens to streams when engines join and leave."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.gateway.config import load
from services.gateway.links import discovery
from services.gateway.links.discovery import (
    Discovery,
    DiscoveryError,
    DnsSource,
    FileSource,
    parse_engine_list,
    parse_source,
)
from weft.v1 import gateway_service_pb2 as pb
from weft.v1 import generation_pb2 as gen


@pytest.fixture
def settle() -> Any:
    async def wait(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110 - any condition can be waited for
                await asyncio.sleep(0.01)

    return wait


def wanted(seed: int = 1, tokens: int = 100, **fields: Any) -> pb.GenerateRequest:
    sampling = gen.SamplingParams(seed=seed, max_tokens=tokens)
    return pb.GenerateRequest(text="Once upon a time", sampling=sampling, **fields)


async def ids_of(call: Any) -> list[int]:
    return [id_ async for response in call for id_ in response.delta.token_ids]


def expected(engine: Any, seed: int, tokens: int) -> list[int]:
    oracle = sys.modules[type(engine).__module__].oracle
    return [oracle(seed, 0, position) for position in range(tokens)]


# -- what is read ------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:1\n127.0.0.1:2\n",
        "# two\n\n127.0.0.1:1   # the first\n:2\n",
        '["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"]',
        '{"engines": ["127.0.0.1:1", "2"], "comment": 1}',
    ],
)
def test_lists_of_every_form(text: str) -> None:
    assert parse_engine_list(text, "f") == {"127.0.0.1:1", "127.0.0.1:2"}


def test_a_line_may_begin_with_the_bracket_of_an_address() -> None:
    assert parse_engine_list("[::1]:50\n127.0.0.1:1\n", "f") == {"[::1]:50", "127.0.0.1:1"}
    assert parse_engine_list('["[::1]:50"]', "f") == {"[::1]:50"}


def test_no_engines_at_all_are_said_in_so_many_words() -> None:
    assert parse_engine_list("[]", "f") == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "[",
        '["127.0.0.1:1"',
        '{"engines": 3}',
        "[1]",
        '{"servers": []}',
        "host:port",
        "127.0.0.1:0",
        "a:1\nb c:2",
        "[" * 100_000,
        "\n".join(f"10.0.{n // 256}.{n % 256}:1" for n in range(1025)),
    ],
)
def test_a_broken_list_is_no_list(text: str) -> None:
    with pytest.raises(DiscoveryError):
        parse_engine_list(text, "f")


def test_sources_are_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    source = parse_source("dns:engines.default.svc:50051", dns_period_s=2.0)
    assert isinstance(source, DnsSource)
    assert (source.name, source.port, source.period_s) == ("engines.default.svc", 50051, 2.0)
    assert isinstance(parse_source("file:/etc/engines"), FileSource)
    config = load(["--tokenizer", "x", "--engine", "dns:e:1", "--engine", "file:/a,b:2"])
    assert config.engine == ("dns:e:1", "file:/a", "b:2")
    for bad in ("dns:e", "dns:e:0", "file:", "http://e:1"):
        with pytest.raises(SystemExit):
            load(["--tokenizer", "x", "--engine", bad])
        assert "--engine" in capsys.readouterr().err


def test_a_file_is_read_when_it_changes_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    source = FileSource(path)
    with pytest.raises(DiscoveryError):
        source.look()
    path.write_text("a:1")
    assert source.look() == {"a:1"}
    assert source.look() is None
    path.write_text("a:1\nb:1")
    assert source.look() == {"a:1", "b:1"}
    other = tmp_path / "other"
    other.write_text("c:1\nd:1")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.rename(path)
    assert source.look() == {"c:1", "d:1"}, "replaced by one of the same size and time"
    path.write_text("[")
    with pytest.raises(DiscoveryError):
        source.look()
    assert source.look() is None, "a bad file is complained of once"
    path.unlink()
    path.mkdir()
    with pytest.raises(DiscoveryError):
        source.look()


class Answers:
    """A resolver that answers as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: Sequence[str] | None = []
        self.hangs = threading.Event()
        self.hangs.set()
        self.asked = 0
        monkeypatch.setattr(socket, "getaddrinfo", self.answer)

    def answer(self, name: Any, port: Any, **_: Any) -> list[Any]:
        self.asked += 1
        self.hangs.wait(20)
        if self.addresses is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in self.addresses]


async def test_a_name_is_resolved_again_and_keeps_its_last_answer(
    monkeypatch: pytest.MonkeyPatch, settle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answers, told = Answers(monkeypatch), []
    monkeypatch.setattr(discovery, "LOOKUP_TIMEOUT_S", 0.2)
    answers.addresses = None
    sources = [parse_source("10.0.0.9:7"), DnsSource("engines", 50051, period_s=0.02)]
    watched = Discovery(sources, told.append)
    assert told == [("10.0.0.9:7",)], "fixed ones need no resolver"
    task = asyncio.create_task(watched.run())
    await settle(lambda: watched.num_failures >= 5)
    assert len([line for line in caplog.records if "last list" in line.message]) == 1
    answers.addresses = ["10.0.0.2", "10.0.0.1", "10.0.0.2"]
    await settle(lambda: len(told) == 2)
    assert told[1] == ("10.0.0.9:7", "10.0.0.1:50051", "10.0.0.2:50051")
    answers.addresses = None
    failures = watched.num_failures
    await settle(lambda: watched.num_failures >= failures + 3)
    answers.hangs.clear()
    asked = answers.asked
    await settle(lambda: answers.asked >= asked + 3)
    assert len(told) == 2
    answers.addresses = ["10.0.0.3"]
    answers.hangs.set()
    await settle(lambda: told[-1] == ("10.0.0.9:7", "10.0.0.3:50051"))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_whatever_a_source_does_it_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, settle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("of no kind that anybody thought of")

    answers, told = Answers(monkeypatch), []
    resolve = discovery.socket.getaddrinfo
    monkeypatch.setattr(discovery.socket, "getaddrinfo", fail)
    watched = Discovery([DnsSource("engines", 50051, period_s=0.02)], told.append)
    task = asyncio.create_task(watched.run())
    await settle(lambda: watched.num_failures >= 3)
    assert len([line for line in caplog.records if "unhandled" in line.message]) == 1
    answers.addresses = ["10.0.0.1"]
    monkeypatch.setattr(discovery.socket, "getaddrinfo", resolve)
    await settle(lambda: told == [("10.0.0.1:50051",)])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# -- joining and leaving ------------------------------------------------------------


@pytest.fixture
def listed(
    start_engine: Any, start_gateway: Any, tmp_path: Path, settle: Any, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Engines in a file, and a gateway that watches it."""
    monkeypatch.setattr(discovery, "FILE_PERIOD_S", 0.02)
    path = tmp_path / "engines.json"

    def write(*engines: Any) -> None:
        new = tmp_path / "new"
        new.write_text(json.dumps([str(engine.address) for engine in engines]))
        new.rename(path)

    async def start(count: int, **knobs: Any) -> Any:
        engines = [await start_engine(**knobs) for _ in range(count)]
        write(engines[0])
        return await start_gateway(f"file:{path}"), engines, write

    return start


def targets(gateway: Any) -> set[str]:
    return {link.target for link in gateway.application.router.links}


async def test_engines_join_and_leave_under_streams(listed: Any, settle: Any) -> None:
    gateway, engines, write = await listed(3, step_s=0.005)
    router = gateway.application.router
    tasks = [asyncio.create_task(ids_of(gateway.stub.Generate(wanted(seed, 900)))) for seed in range(8)]
    await settle(lambda: len(engines[0].slots) == 8)
    write(engines[0], engines[1])
    await settle(lambda: len(router.links) == 2 and all(link.is_up for link in router.links))
    write(engines[1])
    await settle(lambda: len(engines[1].slots) == 8)
    await settle(lambda: targets(gateway) == {str(engines[1].address)})
    await settle(lambda: not engines[0].calls)
    write(engines[1], engines[2])
    await settle(lambda: len(router.links) == 2 and all(link.is_up for link in router.links))
    write(engines[2])
    for seed, ids in enumerate(await asyncio.gather(*tasks)):
        assert ids == expected(engines[0], seed, 900)
    await settle(lambda: targets(gateway) == {str(engines[2].address)})
    assert await ids_of(gateway.stub.Generate(wanted(3, 20))) == expected(engines[2], 3, 20)
    assert router.counters["moves"] == 16
    assert router.counters["replays"] == 0


async def test_an_engine_that_leaves_alone_finishes_what_it_has(listed: Any, settle: Any) -> None:
    gateway, engines, write = await listed(1)
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(1, 600))))
    await settle(lambda: len(engines[0].slots) == 1)
    write()
    await settle(lambda: gateway.application.router.links[0].is_leaving)
    assert await task == expected(engines[0], 1, 600)
    await settle(lambda: not gateway.application.router.links)
    await settle(lambda: not engines[0].calls)
    write(engines[0])
    await settle(lambda: gateway.application.router.is_ready)
    assert await ids_of(gateway.stub.Generate(wanted(2, 20))) == expected(engines[0], 2, 20)


async def test_an_engine_that_comes_back_before_it_has_left_stays(listed: Any, settle: Any) -> None:
    gateway, engines, write = await listed(1)
    link = gateway.application.router.links[0]
    task = asyncio.create_task(ids_of(gateway.stub.Generate(wanted(1, 600))))
    await settle(lambda: len(engines[0].slots) == 1)
    write()
    await settle(lambda: link.is_leaving)
    write(engines[0])
    await settle(lambda: link.is_usable)
    assert await task == expected(engines[0], 1, 600)
    assert gateway.application.router.links == [link]
    assert link.counters.sessions == 1


async def test_a_dead_engine_that_is_taken_off_the_list_leaves_nothing(listed: Any, settle: Any) -> None:
    gateway, engines, write = await listed(2)
    router, fleet = gateway.application.router, gateway.application.fleet
    write(*engines)
    await settle(lambda: len(router.links) == 2 and all(link.is_up for link in router.links))
    gone = weakref.ref(router.links[1])
    await engines[1].die()
    await settle(lambda: not router.links[1].is_up)
    num_tasks = len(asyncio.all_tasks())
    write(engines[0])
    await settle(lambda: len(router.links) == 1)
    await asyncio.sleep(0.1)
    gc.collect()
    assert gone() is None
    assert len(fleet._tasks) == 1
    assert len(asyncio.all_tasks()) < num_tasks + 1


async def test_links_come_and_go_without_leaks(listed: Any, settle: Any) -> None:
    gateway, engines, write = await listed(2)
    router = gateway.application.router
    before: int | None = None
    for _ in range(10):
        write(*engines)
        await settle(lambda: len(router.links) == 2 and all(link.is_up for link in router.links))
        write(engines[0])
        await settle(lambda: len(router.links) == 1 and not engines[1].calls)
        gc.collect()
        if before is None:
            before = len(asyncio.all_tasks())
    assert len(asyncio.all_tasks()) <= before + 2
    assert await ids_of(gateway.stub.Generate(wanted(1, 20))) == expected(engines[0], 1, 20)
