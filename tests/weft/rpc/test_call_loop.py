"""Paths that are not UTF-8: the library's own loop ends at the first, and takes the server with it."""

from __future__ import annotations

import grpc
import pytest

from tests.hostile.raw_h2 import H2
from tests.weft.rpc.probe_service import SERVICE, Probe
from weft.rpc import call_loop
from weft.rpc.address import Address
from weft.rpc.auth import Authenticator, hash_key
from weft.rpc.server import Server

HELLO = Probe(service="hello").SerializeToString()
PATHS = ("/\xff", f"/{SERVICE}/\xff\xfe", "\x80", f"/{SERVICE}/unary_unary\xc3")


def test_this_release_of_the_library_is_guarded() -> None:
    """If it moves what is used here, this says so before anybody else does."""
    assert call_loop._CAN_BE_GUARDED


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_that_is_no_utf8_harms_nobody(probe_server, probe_channel, path: str) -> None:
    stream = probe_channel.stream_stream(f"/{SERVICE}/stream_stream", None, Probe.FromString)()
    await stream.write(HELLO)
    assert (await stream.read()).service == "hello"
    h2 = await H2.connect(probe_server.address)
    h2.call(1, path, HELLO)
    assert await h2.status(1) == "12"
    h2.call(3, f"/{SERVICE}/unary_unary", HELLO)
    assert await h2.status(3) == "0"
    await h2.close()
    await stream.write(HELLO)
    assert (await stream.read()).service == "hello"
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


async def test_a_stranger_is_told_nothing_of_a_method_that_is_not_here() -> None:
    server = Server((SERVICE,), authenticator=Authenticator({"me": hash_key("right")}))
    await server.start(Address("127.0.0.1", 0))
    server.set_serving()
    try:
        h2 = await H2.connect(server.address)
        for stream, (path, key, status) in enumerate(
            (
                ("/\xff", "wrong", "16"),
                ("/a.B/C", "wrong", "16"),
                ("/\xff", "right", "12"),
                ("/a.B/C", "right", "12"),
            )
        ):
            h2.call(2 * stream + 1, path, b"", ("x-api-key", key))
            assert await h2.status(2 * stream + 1) == status, (path, key)
        await h2.close()
    finally:
        await server.stop(0)


async def test_metadata_that_is_no_utf8_is_not_logged(probe_server, caplog: pytest.LogCaptureFixture) -> None:
    """The library would log it as it is, and a key that was pasted wrong is among it."""
    h2 = await H2.connect(probe_server.address)
    h2.call(1, f"/{SERVICE}/unary_unary", HELLO, ("authorization", "Bearer secretw\xf6rd"))
    assert await h2.status(1) == "0"
    await h2.close()
    assert not [record for record in caplog.records if "secretw" in record.getMessage()]
