"""docker compose up, and what it outlives: crashes, a second up, down. One stack serves all, in order."""

from __future__ import annotations

import time

import pytest

from tests.docker.compose_project import ComposeProject, docker, wait_until
from tests.docker.weft_clients import Streams, check_reachable, http_json, http_stream
from weft.client import Client

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]
STREAM_S = 240.0
HEALTHY_S = 180.0


def artifact_facts(project: ComposeProject, name: str) -> str:
    """CURRENT, and the time and inode of every file of the model, as the engine sees them."""
    code = (
        f"import os; print(open('/artifacts/{name}/CURRENT').read().strip())\n"
        f"for top, _, files in sorted(os.walk('/artifacts/{name}')):\n"
        "    for file in sorted(files):\n"
        "        stat = os.stat(os.path.join(top, file))\n"
        "        print(top, file, stat.st_ino, stat.st_mtime_ns, stat.st_size)"
    )
    found = project.execute("engine", "python", "-c", code)
    assert found.returncode == 0, found.stderr
    return found.stdout


def quantizer_events(project: ComposeProject) -> list[str]:
    return [event["event"] for event in project.events("quantizer") if event.get("logger") == "quantizer"]


def test_the_first_up_publishes_and_serves(stack: ComposeProject) -> None:
    quantizer = stack.state("quantizer")["State"]
    assert (quantizer["Status"], quantizer["ExitCode"], quantizer["OOMKilled"]) == ("exited", 0, False)
    assert quantizer_events(stack)[-1] == "published"
    assert stack.is_healthy("engine")
    assert stack.is_healthy("gateway")
    check_reachable(stack.ports["grpc"])
    with Client(f"127.0.0.1:{stack.ports['grpc']}") as client:
        assert {model.name for model in client.models()} == {"demo"}


def test_a_client_streams_over_grpc(stack: ComposeProject) -> None:
    streams = Streams(stack.ports["grpc"], 4, 40)
    for result in streams.join(STREAM_S):
        assert not result.error
        assert len(result.token_ids) == 40
        assert result.text


def test_http_answers_and_streams(stack: ComposeProject) -> None:
    port = stack.ports["http"]
    assert "demo" in [model["id"] for model in http_json(port, "/v1/models")["data"]]
    assert http_json(port, "/healthz")["status"] == "ok"
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    events = http_stream(port, body)
    assert len(events) > 2, "in pieces, not at once"
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    with Client(f"127.0.0.1:{stack.ports['grpc']}") as client:
        assert text == client.generate("Once upon a time", max_tokens=24, temperature=0.0).text()


def test_streams_outlive_a_crash_of_the_engine(stack: ComposeProject, measure) -> None:
    """The only engine: its streams wait for the restart, then go on as if nothing had been."""
    undisturbed = Streams(stack.ports["grpc"], 6, 300).join(STREAM_S)
    restarts = stack.state("engine")["RestartCount"]
    streams = Streams(stack.ports["grpc"], 6, 300)
    streams.wait_for_tokens(20, STREAM_S)
    assert all(len(result.token_ids) < 300 for result in streams.results), "nothing left to interrupt"
    killed_at = stack.crash("engine")
    wait_until(lambda: stack.state("engine")["RestartCount"] == restarts + 1, 60, "restarted by its policy")
    wait_until(lambda: stack.is_healthy("engine"), HEALTHY_S, "the engine is healthy again")
    measure("engine: crash to healthy", f"{time.time() - killed_at:.1f} s")
    found = streams.join(STREAM_S)
    assert [result.error for result in found] == [""] * 6
    assert [result.token_ids for result in found] == [result.token_ids for result in undisturbed]
    assert [result.text for result in found] == [result.text for result in undisturbed]
    gaps = [result.gap_s for result in found]
    assert max(gaps) > 1.0, "the crash was felt: a test that cannot fail is none"
    measure("worst gap of a stream over the engine's crash", f"{max(gaps):.1f} s")


def test_sessions_outlive_a_crash_of_the_gateway(stack: ComposeProject, measure) -> None:
    target = f"127.0.0.1:{stack.ports['grpc']}"
    with Client(target) as client:
        client.create_session(session_id="kept")
        client.generate("It was a cold", session_id="kept", max_tokens=16, temperature=0.0).text()
        before = client.get_session("kept")
        killed_at = stack.crash("gateway")
        wait_until(lambda: stack.state("gateway")["RestartCount"] == 1, 60, "restarted by its policy")
        wait_until(lambda: stack.is_healthy("gateway"), HEALTHY_S, "the gateway is healthy again")
        measure("gateway: crash to healthy", f"{time.time() - killed_at:.1f} s")
    with Client(target) as client:
        after = client.get_session("kept")
        assert after.num_tokens == before.num_tokens > 16
        assert client.generate(" and", session_id="kept", max_tokens=8, temperature=0.0).text()
        assert client.get_session("kept").num_tokens > before.num_tokens


def test_a_second_up_quantizes_nothing(stack: ComposeProject, measure) -> None:
    before, engine = artifact_facts(stack, "demo"), stack.state("engine")["Id"]
    begin = time.monotonic()
    stack.compose("up", "--detach", "--wait")
    measure("second up, running already", f"{time.monotonic() - begin:.1f} s")
    events = quantizer_events(stack)
    assert events[-1] == "up to date"
    assert events.count("quantizing") == 1
    assert artifact_facts(stack, "demo") == before
    assert stack.state("engine")["Id"] == engine


def test_a_batch_job_beside_it(stack: ComposeProject) -> None:
    flags = ["--source=/models/demo", "--artifacts=/artifacts", "--name=second"]
    done = stack.compose("run", "--rm", "--no-deps", "quantizer", "run", *flags)
    assert done.stdout.splitlines()[0].startswith("/artifacts/second/")
    assert artifact_facts(stack, "second").splitlines()[0] == done.stdout.splitlines()[0].rpartition("/")[2]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--source=/models/none", "--name=x"], 1, "/models/none"),
        (["--source=/models/demo", "--name=../x"], 2, "../x"),
        (["--source=/models/demo", "--name=x", "--group-size=33"], 2, "--group-size"),
        (["--source=/models/demo"], 2, "--name"),
    ],
)
def test_a_batch_job_with_bad_input(stack: ComposeProject, flags: list[str], code: int, words: str) -> None:
    done = stack.compose(
        "run", "--rm", "--no-deps", "quantizer", "run", "--artifacts=/artifacts", *flags, check=False
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_one_of_two_engines_is_killed(stack: ComposeProject, measure) -> None:
    """The other takes its streams, at once: nobody waits for the restart."""
    undisturbed = Streams(stack.ports["grpc"], 6, 300).join(STREAM_S)
    ups = _ups(stack.events("gateway"))
    stack.compose("up", "--detach", "--wait", "--no-recreate", "--scale=engine=2")
    wait_until(
        lambda: _ups(stack.events("gateway")) > ups,
        60,
        "the gateway has found the second engine",
    )
    streams = Streams(stack.ports["grpc"], 6, 300)
    streams.wait_for_tokens(20, STREAM_S)
    stack.crash("engine", 1)
    found = streams.join(STREAM_S)
    assert [result.error for result in found] == [""] * 6
    assert [result.token_ids for result in found] == [result.token_ids for result in undisturbed]
    measure("worst gap with a second engine", f"{max(result.gap_s for result in found):.1f} s")
    wait_until(lambda: stack.is_healthy("engine", 1), HEALTHY_S, "the first engine is healthy again")
    stack.compose("up", "--detach", "--wait", "--no-recreate", "--scale=engine=1")


def _ups(events: list[dict]) -> int:
    return sum(event["event"] == "engine up" for event in events)


@pytest.mark.parametrize("service", ["gateway", "engine"])
def test_stop_is_in_order_and_in_time(stack: ComposeProject, service: str, measure) -> None:
    name, begin = stack.container(service), time.monotonic()
    docker("stop", "--time=60", name)
    measure(f"{service}: SIGTERM to exit", f"{time.monotonic() - begin:.1f} s")
    state = stack.state(service)["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    assert time.monotonic() - begin < 55, "by itself, not by SIGKILL"


def test_down_loses_no_artifact(stack: ComposeProject, measure) -> None:
    stack.compose("up", "--detach", "--wait")
    before = artifact_facts(stack, "demo")
    with Client(f"127.0.0.1:{stack.ports['grpc']}") as client:
        client.create_session(session_id="left")
        client.generate("It was a cold", session_id="left", max_tokens=16, temperature=0.0).text()
    stack.compose("down")
    begin = time.monotonic()
    stack.compose("up", "--detach", "--wait")
    measure("up to healthy with the artifact there", f"{time.monotonic() - begin:.1f} s")
    assert quantizer_events(stack) == ["up to date"]
    assert artifact_facts(stack, "demo") == before
    (result,) = Streams(stack.ports["grpc"], 1, 8).join(STREAM_S)
    assert len(result.token_ids) == 8
    with Client(f"127.0.0.1:{stack.ports['grpc']}") as client:
        assert client.get_session("left").num_tokens > 16, "sessions too"
