"""Runs as containers: what the engine is asked for, by a client that writes it down."""

from pathlib import Path

import pytest
from docker.errors import APIError, ImageNotFound, NotFound

from services.quantizer.jobs import docker_runner
from services.quantizer.jobs.docker_runner import CONTAINER_PLACES, DockerRunner, DockerSettings
from services.quantizer.jobs.runner import StartFailed, Task


class FakeContainer:
    """Says its lines and ends with its status; the first log stream may break off."""

    def __init__(self, labels=None, chunks=(b"",), status=0, breaks_after=None):
        self.labels, self.chunks, self.exit_status = labels or {}, list(chunks), status
        self.breaks_after = breaks_after
        self.calls, self.status, self.streams = [], "running", []

    def start(self):
        self.calls.append("start")

    def logs(self, stream=False, since=None, stdout=True, stderr=True, **_options):
        if not stream:
            assert (stdout, stderr) == (True, False)
            return b"/artifacts/m/awq-1\nmore\n"
        assert (stdout, stderr) == (False, True)
        self.streams.append(since)
        return self._stream()

    def _stream(self):
        if self.breaks_after is not None and len(self.streams) == 1:
            yield from self.chunks[: self.breaks_after]
            raise ConnectionError("read timed out")
        yield from self.chunks[self.breaks_after or 0 :]
        self.status = "exited"

    def reload(self):
        if self.status == "removed":
            raise NotFound("gone")

    def wait(self):
        return {"StatusCode": self.exit_status}

    def stop(self, timeout):
        self.calls.append(("stop", timeout))

    def remove(self, force):
        self.calls.append(("remove", force))


class FakeClient:
    """An engine with one container to give."""

    def __init__(self, container=None, error=None, others=()):
        self.containers, self._container, self._error, self._others = self, container, error, others
        self.created, self.filters, self.is_closed = [], None, False

    def create(self, image, command, **options):
        if self._error:
            raise self._error
        self.created.append((image, command, options))
        return self._container

    def list(self, all, filters):
        assert all
        self.filters = filters
        return list(self._others)

    def close(self):
        self.is_closed = True


SETTINGS = DockerSettings(
    "weft/quantizer",
    {"/host/models": (CONTAINER_PLACES.sources, "ro"), "artifacts": (CONTAINER_PLACES.artifacts, "rw")},
    "feed",
    memory="8g",
)
TASK = Task("job-1", 5, "cpu", {"name": "m", "source": "/sources/m", "device": "cpu"}, False)


@pytest.fixture
def make_runner():
    def make(client):
        return DockerRunner(client, SETTINGS, 12.4, 1)

    return make


async def test_a_container_gets_little_and_what_it_needs(make_runner):
    client = FakeClient(FakeContainer())
    runner = make_runner(client)
    await runner.start(TASK)
    ((image, command, options),) = client.created
    assert image == "weft/quantizer"
    assert command == ["run", "--name=m", "--source=/sources/m", "--device=cpu", "--fencing-token=5"]
    assert options["name"] == "weft-job-1-5"
    assert options["labels"] == {"weft.state": "feed", "weft.job": "job-1", "weft.token": "5"}
    assert options["volumes"] == {
        "/host/models": {"bind": "/sources", "mode": "ro"},
        "artifacts": {"bind": "/artifacts", "mode": "rw"},
    }
    assert options["network_mode"] == "none"
    assert options["environment"] == {"HF_HUB_OFFLINE": "1"}
    assert options["device_requests"] is None
    assert options["mem_limit"] == options["memswap_limit"] == "8g"
    assert options["user"] == "10001:10001"
    assert options["read_only"] is True
    assert options["init"] is True
    assert options["cap_drop"] == ["ALL"]
    assert options["security_opt"] == ["no-new-privileges:true"]
    assert options["tmpfs"] == {"/tmp": "mode=1777"}
    assert not {"privileged", "cap_add", "pid_mode", "ipc_mode", "devices"} & options.keys()
    await runner.close()
    assert client.is_closed


async def test_a_gpu_and_the_hub_are_given_to_whom_they_are_for(make_runner):
    client = FakeClient(FakeContainer())
    await make_runner(client).start(Task("job-1", 5, "cuda:3", {"device": "cuda:3"}, True))
    ((_, command, options),) = client.created
    assert "--device=cuda:0" in command
    (request,) = options["device_requests"]
    assert request["DeviceIDs"] == ["3"]
    assert request["Capabilities"] == [["gpu"]]
    assert options["network_mode"] == "bridge"
    assert options["environment"] == {"HF_HUB_OFFLINE": "0"}


async def test_a_run_is_followed_to_its_end_and_removed(make_runner):
    container = FakeContainer(chunks=[b'{"event": "pl', b'an"}\nsecond\n', b"last"], status=3)
    run = await make_runner(FakeClient(container)).start(TASK)
    assert [line async for line in run.lines()] == ['{"event": "plan"}', "second", "last"]
    ended = await run.wait()
    assert (ended.code, ended.first_line) == (3, "/artifacts/m/awq-1")
    assert container.calls == ["start", ("remove", True)]


async def test_a_log_that_breaks_off_is_taken_up_again(make_runner, monkeypatch):
    monkeypatch.setattr(docker_runner, "_RETRY_S", 0.0)
    container = FakeContainer(chunks=[b"one\n", b"two\n"], breaks_after=1)
    run = await make_runner(FakeClient(container)).start(TASK)
    assert [line async for line in run.lines()] == ["one", "two"]
    assert container.streams[0] is None
    assert container.streams[1] > 1_700_000_000


async def test_a_container_that_someone_removed_was_killed(make_runner, monkeypatch):
    container = FakeContainer(chunks=[b"one\n"])
    run = await make_runner(FakeClient(container)).start(TASK)
    container.status = "removed"

    def wait():
        raise NotFound("gone")

    monkeypatch.setattr(container, "wait", wait)
    assert [line async for line in run.lines()] == ["one"]
    assert (await run.wait()).code == 137


async def test_stopping_has_its_grace(make_runner):
    container = FakeContainer()
    run = await make_runner(FakeClient(container)).start(TASK)
    await run.stop()
    assert container.calls[-1] == ("stop", 12)


@pytest.mark.parametrize(
    "error", [ImageNotFound("no such image"), APIError("500\nserver error"), OSError("pipe")]
)
async def test_what_cannot_be_started_is_one_line(make_runner, error):
    with pytest.raises(StartFailed) as failed:
        await make_runner(FakeClient(error=error)).start(TASK)
    assert "\n" not in str(failed.value)


async def test_a_container_that_does_not_start_is_removed(make_runner, monkeypatch):
    container = FakeContainer()

    def start():
        raise APIError("no such device")

    monkeypatch.setattr(container, "start", start)
    with pytest.raises(StartFailed):
        await make_runner(FakeClient(container)).start(TASK)
    assert container.calls == [("remove", True)]


async def test_containers_of_services_that_are_gone_are_ended(make_runner):
    def labels(job, token):
        return {"weft.state": "feed", "weft.job": job, "weft.token": token}

    live, stale, odd = (FakeContainer(labels(*pair)) for pair in (("a", "5"), ("a", "4"), ("b", "x")))
    client = FakeClient(others=[live, stale, odd])
    await make_runner(client).remove_leftovers(lambda job, token: (job, token) == ("a", 5))
    assert client.filters == {"label": "weft.state=feed"}
    assert live.calls == []
    assert stale.calls == odd.calls == [("stop", 12), ("remove", True)]


def test_without_an_engine_it_is_one_line(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with pytest.raises(StartFailed, match="no docker engine") as failed:
        docker_runner.connect()
    assert "\n" not in str(failed.value)
    assert Path("/sources") == CONTAINER_PLACES.sources
