"""Keys and certificates, over gRPC and HTTP, as the other commands have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_server import TimedServer
from weft.rpc.tls import ServerTls

pytest.importorskip("cryptography")
from tests.cli.bench.conftest import in_thread
from tests.weft.rpc.certificates import Authority, Pair


@dataclass(frozen=True)
class Guarded:
    """A server that lets in who has the key and a certificate."""

    server: TimedServer
    authority: Authority
    client: Pair

    def flags(self, protocol: str) -> str:
        """Where it is."""
        server = self.server
        if protocol == "http":
            return f"--url https://{server.http_address}"
        return f"--server {server.grpc_address}" + (" --multiplex" if protocol == "multiplex" else "")

    @property
    def certificates(self) -> str:
        """How to be let in."""
        return f"--tls-ca {self.authority.ca} --tls-cert {self.client.cert} --tls-key {self.client.key}"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    authority = Authority(tmp_path_factory.mktemp("tls"))
    pair = authority.sign("server")
    server = TimedServer(first_s=0.002, gap_s=0.001)
    server.tls, server.api_key = ServerTls(pair.cert, pair.key, authority.ca), "key-1"
    with in_thread(server):
        yield Guarded(server, authority, authority.sign("client"))


@pytest.mark.parametrize("protocol", ["grpc", "multiplex", "http"])
def test_who_has_both_is_served(bench: Any, guarded: Guarded, protocol: str) -> None:
    where = f"{guarded.flags(protocol)} {guarded.certificates} --api-key key-1"
    ran = bench(f"{where} --requests 3 --output-tokens 3")
    assert ran.result.exit_code == 0, ran.result.output
    assert ran.point["requests"]["ok"] == 3


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_who_has_not_is_told_in_one_line(bench: Any, guarded: Guarded, protocol: str, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    where = guarded.flags(protocol)
    for flags, word in (
        (f"{guarded.certificates} --api-key key-2", "key"),
        (f"{guarded.certificates}", "key"),
        (f"--tls-ca {stranger.ca} --api-key key-1", "UNAVAILABLE: nobody answers"),
    ):
        ran = bench(f"{where} {flags} --requests 1")
        assert ran.result.exit_code == 1, ran.result.output
        assert len(ran.result.stderr.splitlines()) == 1
        assert word in ran.result.stderr
        assert not ran.document


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_files_that_are_no_certificates_are_one_line(
    bench: Any, guarded: Guarded, protocol: str, tmp_path: Path
) -> None:
    (tmp_path / "none.pem").write_text("nothing")
    for path in (tmp_path / "none.pem", tmp_path / "missing.pem"):
        ran = bench(f"{guarded.flags(protocol)} --tls-ca {path}")
        assert ran.result.exit_code in (1, 2)
        assert path.name in ran.result.stderr.replace("\n", "").replace("│", "").replace(" ", "")
        assert "Traceback" not in ran.result.output


def test_the_key_may_come_from_the_environment(
    bench: Any, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_API_KEY", "key-1")
    ran = bench(f"{guarded.flags('http')} {guarded.certificates} --requests 1 --output-tokens 2")
    assert ran.result.exit_code == 0, ran.result.output


def test_an_authority_needs_an_encrypted_address(bench: Any, guarded: Guarded) -> None:
    ran = bench(f"--url http://127.0.0.1:1 --tls-ca {guarded.authority.ca}")
    assert ran.result.exit_code == 2
