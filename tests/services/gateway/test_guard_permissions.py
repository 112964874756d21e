"""Who may call what: every method of every service, and every path, under every kind of credential."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from services.gateway.permissions import check_model, meant_model
from tests.services.gateway.guard_process import DEMO, GuardProcess
from weft.rpc.address import parse_address
from weft.rpc.auth import ANYBODY, Authenticator, Caller, hash_key
from weft.rpc.errors import StatusError
from weft.v1 import admin_service_pb2, engine_service_pb2
from weft.v1 import gateway_service_pb2 as pb
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

OFFERED = (pb, health_pb2, reflection_pb2)
ABSENT = (admin_service_pb2, engine_service_pb2)
UNKNOWN = ("/weft.v1.GatewayService/Nope", "/grpc.channelz.v1.Channelz/GetServers", "/a.B/Generate")
REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED")
OPEN = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
PATHS = {
    ("POST", "/v1/completions"): "Generate",
    ("POST", "/v1/chat/completions"): "Generate",
    ("GET", "/v1/models"): "ListModels",
    ("GET", "/v1/models/demo"): "ListModels",
    ("GET", "/metrics"): "Metrics",
}


def methods_of(*modules: Any) -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


# Health's List is the library's, and no method of ours.
METHODS = [method for method in methods_of(*OFFERED) if not method.endswith("Health/List")]
CREDENTIALS: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "wrong": [("authorization", "Bearer nobodys")],
    "malformed": [("authorization", "Basic all")],
    "twice": [("authorization", "Bearer all"), ("x-api-key", "all")],
    "all": [("authorization", "Bearer all")],
    "listed": [("x-api-key", "listed")],
    "other": [("authorization", "Bearer other")],
}


def write_keys(path: Path, listed: str) -> None:
    lines = [
        f"all:{hash_key('all')}",
        f"listed:{hash_key('listed')} methods={listed}",
        f"other:{hash_key('other')} methods=NothingOfThis",
    ]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def keys(tmp_path: Path) -> Authenticator:
    write_keys(tmp_path / "keys", "Generate")
    return Authenticator.from_file(tmp_path / "keys")


async def status_of(channel: grpc.aio.Channel, method: str, metadata: list[tuple[str, str]]) -> str:
    """What a call with an empty message comes to; OK for one that waits for more. On the wire a call of any
    kind may look like this.
    """
    call = channel.unary_stream(method)(b"", metadata=metadata, timeout=20)
    try:
        while await call.read() is not grpc.aio.EOF:
            if method.endswith("/Watch"):
                return "OK"
        return (await call.code()).name
    except grpc.aio.AioRpcError as error:
        return error.code().name
    finally:
        call.cancel()


async def test_every_method_under_every_credential(
    start_gateway: Any, engine: Any, keys: Authenticator, tmp_path: Path
) -> None:
    gateway = await start_gateway(engine, authenticator=keys)
    assert len(METHODS) >= 12
    for method in METHODS:
        write_keys(tmp_path / "keys", method.rpartition("/")[2])
        keys.reload()
        found = {name: await status_of(gateway.channel, method, key) for name, key in CREDENTIALS.items()}
        refusals = {name: code for name, code in found.items() if code in REFUSALS}
        if method in OPEN:
            assert not refusals, (method, found)
            continue
        assert refusals == {
            **dict.fromkeys(("none", "wrong", "malformed", "twice"), "UNAUTHENTICATED"),
            "other": "PERMISSION_DENIED",
        }, (method, found)
        assert found["all"] == found["listed"] != "UNKNOWN", (method, found)


async def test_a_method_that_is_not_here_is_told_only_to_those_who_may_call_all(
    start_gateway: Any, engine: Any, keys: Authenticator
) -> None:
    gateway = await start_gateway(engine, authenticator=keys)
    for method in [*UNKNOWN, *methods_of(*ABSENT)]:
        for name, key in CREDENTIALS.items():
            expected = "UNIMPLEMENTED" if name == "all" else "PERMISSION_DENIED"
            expected = expected if name in ("all", "listed", "other") else "UNAUTHENTICATED"
            assert await status_of(gateway.channel, method, key) == expected, (method, name)


async def test_every_path_under_every_credential(
    start_gateway: Any, engine: Any, keys: Authenticator, tmp_path: Path
) -> None:
    gateway = await start_gateway(engine, authenticator=keys, http=parse_address("127.0.0.1:0"))
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        for (verb, path), method in PATHS.items():
            write_keys(tmp_path / "keys", method)
            keys.reload()
            found = {}
            for name, headers in CREDENTIALS.items():
                answer = await client.request(
                    verb, path, headers=headers, json={} if verb == "POST" else None
                )
                found[name] = answer.status_code
            assert [found[name] for name in ("none", "wrong", "malformed", "twice")] == [401] * 4, (
                path,
                found,
            )
            assert found["other"] == 403, (path, found)
            assert found["all"] == found["listed"] == (400 if verb == "POST" else 200), (path, found)
        assert (await client.get("/healthz")).status_code == 200
        served = {(verb, route.path) for route in routes(gateway) for verb in route.methods - {"HEAD"}}
        assert served == {(v, "/v1/models/{name}" if p.endswith("/demo") else p) for v, p in PATHS} | {
            ("GET", "/healthz")
        }


def routes(gateway: Any) -> Any:
    return gateway.application.http.app.routes


MODELS = {("a", "v1"), ("b", "v1"), ("b", "v2")}


@pytest.mark.parametrize(
    ("allowed", "asked", "meant"),
    [
        (None, "", ""),
        (None, "anything@v9", "anything@v9"),
        ({"a"}, "a", "a"),
        ({"a"}, "", "a"),
        ({"a"}, "a@v7", "a@v7"),
        ({"a"}, "b", None),
        ({"a"}, "no-such", None),
        ({"a"}, "aa", None),
        ({"a"}, "@v1", None),
        ({"a", "b"}, "", ""),
        ({"b@v2"}, "", "b@v2"),
        ({"b@v2"}, "b", "b@v2"),
        ({"b@v2"}, "b@v2", "b@v2"),
        ({"b@v2"}, "b@v1", None),
        ({"b@v2", "b@v7"}, "b", "b@v2"),
        ({"b@v1", "b@v2"}, "b", None),
        ({"b@v8", "b@v9"}, "b", None),
        ({"c"}, "", ""),
    ],
)
def test_the_model_that_a_key_means(allowed: set[str] | None, asked: str, meant: str | None) -> None:
    caller = Caller("me", models=None if allowed is None else frozenset(allowed))
    if meant is not None:
        assert meant_model(caller, asked, MODELS) == meant
        return
    with pytest.raises(StatusError) as caught:
        meant_model(caller, asked, MODELS)
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED


def test_what_was_found_is_checked_once_more() -> None:
    check_model(ANYBODY, "a", "v1")
    check_model(Caller("me", models=frozenset({"a@v1"})), "a", "v1")
    with pytest.raises(StatusError):
        check_model(Caller("me", models=frozenset({"a@v1"})), "a", "v2")


@pytest.fixture
async def two_models(start_engine: Any, start_gateway: Any, tmp_path: Path) -> Any:
    engines = [await start_engine() for _ in range(2)]
    engines[1].info.model_name = "secret"
    path = tmp_path / "keys"
    path.write_text(
        f"one:{hash_key('one')} models=demo@v1\nany:{hash_key('any')}\nno:{hash_key('no')} models=x\n"
    )
    gateway = await start_gateway(
        *engines, authenticator=Authenticator.from_file(path), http=parse_address("127.0.0.1:0")
    )
    router = gateway.application.router
    async with asyncio.timeout(10):
        while len({link.info.model_name for link in router.links if link.info}) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return gateway


def key(name: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {name}")]


async def code_of(call: Any) -> str:
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_models_over_grpc(two_models: Any) -> None:
    stub = two_models.stub
    listed = await stub.ListModels(pb.ListModelsRequest(), metadata=key("one"))
    assert [model.name for model in listed.models] == ["demo"]
    listed = await stub.ListModels(pb.ListModelsRequest(), metadata=key("any"))
    assert [model.name for model in listed.models] == ["demo", "secret"]
    assert not (await stub.ListModels(pb.ListModelsRequest(), metadata=key("no"))).models
    denied, ok = "PERMISSION_DENIED", "OK"
    for name, model, expected in (
        ("one", "demo", ok),
        ("one", "", ok),
        ("one", "secret", denied),
        ("one", "no-such", denied),
        ("any", "secret", ok),
        ("any", "no-such", "NOT_FOUND"),
        ("any", "", "INVALID_ARGUMENT"),
        ("no", "demo", denied),
    ):
        text = {"model": model, "text": "x"}
        generate = pb.GenerateRequest(**text)  # type: ignore[arg-type]
        generate.sampling.max_tokens = 1
        calls = (
            stub.Generate(generate, metadata=key(name)),
            stub.Tokenize(pb.TokenizeRequest(**text), metadata=key(name)),  # type: ignore[arg-type]
            stub.Detokenize(pb.DetokenizeRequest(model=model, token_ids=[300]), metadata=key(name)),
        )
        for call in calls:
            assert await code_of(call) == expected, (name, model)
        if expected == denied:
            create = stub.CreateSession(pb.CreateSessionRequest(model=model), metadata=key(name))
            assert await code_of(create) == denied, (name, model)
        call = stub.Multiplex(metadata=key(name))
        await call.write(pb.MultiplexRequest(stream_id=1, generate=generate))
        await call.done_writing()
        codes = [response.end.failure.code async for response in call if response.HasField("end")]
        assert codes == [getattr(grpc.StatusCode, expected).value[0]], (name, model)


async def test_models_over_http(two_models: Any) -> None:
    async with httpx.AsyncClient(base_url=two_models.http_url, headers=key("one")) as client:
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == [
            "demo",
            "demo@v1",
        ]
        assert (await client.get("/v1/models/demo")).status_code == 200
        assert (await client.get("/v1/models/secret")).status_code == 404
        for path, prompt in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            for model, status in (("demo", 200), ("secret", 403), ("no-such", 403)):
                answer = await client.post(path, json={"model": model, "max_tokens": 1, **prompt})
                assert answer.status_code == status, (path, model, answer.text)


async def test_metrics_are_of_every_model_and_key(start_gateway: Any, engine: Any, tmp_path: Path) -> None:
    """A key of some models must name them."""
    path = tmp_path / "keys"
    path.write_text(
        f"all:{hash_key('all')}\none:{hash_key('one')} models=demo\n"
        f"named:{hash_key('named')} models=demo methods=Metrics\n"
    )
    gateway = await start_gateway(
        engine, authenticator=Authenticator.from_file(path), http=parse_address("127.0.0.1:0")
    )
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        for name, status in (("all", 200), ("one", 403), ("named", 200)):
            assert (await client.get("/metrics", headers=key(name))).status_code == status, name


async def test_what_is_tokenized_counts_as_a_request_of_its_key(
    start_gateway: Any, engine: Any, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"slow:{hash_key('slow')} requests_per_second=0.01\nfree:{hash_key('free')}\n")
    gateway = await start_gateway(engine, authenticator=Authenticator.from_file(path))
    stub = gateway.stub
    tokenize, detokenize = pb.TokenizeRequest(text="x"), pb.DetokenizeRequest(token_ids=[300])
    # One after the other: a call is under way as soon as it is made.
    codes = [
        await code_of(method(request, metadata=key(name)))
        for method, request, name in (
            (stub.Tokenize, tokenize, "slow"),
            (stub.Tokenize, tokenize, "slow"),
            (stub.Detokenize, detokenize, "slow"),
            (stub.ListModels, pb.ListModelsRequest(), "slow"),
            (stub.Tokenize, tokenize, "free"),
        )
    ]
    assert codes == ["OK", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", "OK", "OK"]


async def test_a_key_that_goes_ends_what_its_open_stream_may_begin(
    start_gateway: Any, engine: Any, keys: Authenticator, tmp_path: Path
) -> None:
    """A Multiplex call outlives a change of the key file; its next request is judged by the new one."""
    gateway = await start_gateway(engine, authenticator=keys)
    call = gateway.stub.Multiplex(metadata=[("authorization", "Bearer all")])
    generate = pb.GenerateRequest(text="x")
    generate.sampling.max_tokens = 2

    async def end_of(stream_id: int) -> int:
        await call.write(pb.MultiplexRequest(stream_id=stream_id, generate=generate))
        async for response in call:
            if response.HasField("end"):
                return int(response.end.failure.code)
        raise AssertionError("no end came")

    assert await end_of(1) == 0
    (tmp_path / "keys").write_text(f"all:{hash_key('all')} models=other\n")
    keys.reload()
    assert await end_of(2) == grpc.StatusCode.PERMISSION_DENIED.value[0]
    (tmp_path / "keys").write_text(f"all:{hash_key('all')} methods=Generate\n")
    keys.reload()
    assert await end_of(4) == grpc.StatusCode.PERMISSION_DENIED.value[0]
    (tmp_path / "keys").write_text(f"else:{hash_key('else')}\n")
    keys.reload()
    assert await end_of(3) == grpc.StatusCode.UNAUTHENTICATED.value[0]
    call.cancel()


async def test_a_process_reads_its_key_file_again(engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"a:{hash_key('first')}\n")
    running = await GuardProcess.start(
        "services.gateway",
        *("--listen", "127.0.0.1:0", "--engine", engine.address, "--tokenizer", DEMO),
        *("--api-key-file", path, "--tls-reload-seconds", 3600),
    )
    try:
        address = (await running.wait_for("listening"))["address"]
        await running.wait_for("serving")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = GatewayServiceStub(channel)

            async def code(name: str) -> str:
                return await code_of(stub.ListModels(pb.ListModelsRequest(), metadata=key(name), timeout=20))

            assert [await code("first"), await code("second")] == ["OK", "UNAUTHENTICATED"]
            path.write_text("a:secretword\n")
            running.send(signal.SIGHUP)
            problem = await running.wait_for("not reloaded, the old one stays")
            assert "line 1" in problem["reason"]
            assert await code("first") == "OK"
            path.write_text(f"a:{hash_key('second')}\n")
            running.send(signal.SIGHUP)
            await running.wait_for("reloaded")
            assert [await code("first"), await code("second")] == ["UNAUTHENTICATED", "OK"]
        assert b"secretword" not in b"".join(running.lines)
    finally:
        assert await running.end() == 0


@pytest.mark.slow
async def test_a_hangup_reaches_every_process(engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"a:{hash_key('first')}\n")
    running = await GuardProcess.start(
        "services.gateway",
        *("--listen", "127.0.0.1:0", "--engine", engine.address, "--tokenizer", DEMO),
        *("--api-key-file", path, "--tls-reload-seconds", 3600, "--processes", 2),
    )
    try:
        for _ in range(2):
            await running.wait_for("serving")
        path.write_text(f"a:{hash_key('second')}\n")
        running.send(signal.SIGHUP)
        for _ in range(2):
            await running.wait_for("reloaded")
    finally:
        assert await running.end() == 0
