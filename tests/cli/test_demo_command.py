"""`weft demo`: what would fail later fails at once, in one line."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.__main__ import app
from cli.demo import command, run
from cli.demo.processes import ServiceError
from cli.demo.run import DemoOptions, check_before, demo_model, weft_command

runner = CliRunner()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[DemoOptions]:
    """What the command would run."""
    found: list[DemoOptions] = []
    monkeypatch.setattr(command, "run_demo", lambda options: found.append(options) or 0)
    monkeypatch.setattr(command, "missing", lambda _: {})
    return found


def test_it_works_below_the_folder_it_is_called_in(
    asked: list[DemoOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runner.invoke(app, ["demo"]).exit_code == 0
    assert asked == [DemoOptions(tmp_path / ".weft", is_up=False, grpc_port=50052, http_port=8080)]


def test_every_option_arrives(asked: list[DemoOptions], tmp_path: Path) -> None:
    words = ["demo", "--up", "--data", str(tmp_path / "x"), "--listen", "0", "--http", "8081"]
    assert runner.invoke(app, words).exit_code == 0
    assert asked == [DemoOptions(tmp_path / "x", is_up=True, grpc_port=0, http_port=8081)]


@pytest.mark.parametrize(
    "words", [["--listen", "1"], ["--up", "--http", "65536"], ["--up", "--listen", "-1"]]
)
def test_ports_that_make_no_sense_are_refused(asked: list[DemoOptions], words: list[str]) -> None:
    assert runner.invoke(app, ["demo", *words]).exit_code == 2
    assert not asked


def test_missing_packages_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"engine": ["torch"], "quantizer": ["torch", "transformers"]}
    monkeypatch.setattr(command, "missing", lambda _: lacking)
    done = runner.invoke(app, ["demo"])
    assert done.exit_code == 2
    assert done.stderr == ("demo: not installed: torch, transformers; pip install 'weft[engine,quantizer]'\n")


def demo(data: Path, capsys: pytest.CaptureFixture[str], **ports: int) -> str:
    """Run it to its early end; the one line."""
    options = DemoOptions(data, bool(ports), ports.get("grpc_port", 0), ports.get("http_port", 0))
    assert run.run_demo(options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


@pytest.fixture
def no_services(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, _: object) -> None:
        raise ServiceError(f"{name} was run")

    monkeypatch.setattr(run, "run", refuse)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)


@pytest.mark.parametrize("which", ["grpc_port", "http_port"])
def test_a_port_in_use_is_told(
    no_services: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = demo(tmp_path, capsys, **{which: port})
    flag = {"grpc_port": "--listen", "http_port": "--http"}[which]
    assert line == f"demo: port {port}: Address already in use; {flag} takes another"


def test_a_folder_that_cannot_be_written_is_told(
    no_services: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert demo(file / "data", capsys) == f"demo: {file / 'data'}: Not a directory"
    assert demo(file, capsys) == f"demo: {file}: File exists"
    if os.geteuid() == 0:
        return  # root may write anywhere
    closed = tmp_path / "closed"
    closed.mkdir(0o500)
    assert demo(closed, capsys) == f"demo: {closed / '.writable'}: Permission denied"


def test_what_a_service_says_is_told(
    no_services: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(tmp_path / "new", capsys) == "demo: quantizer was run"
    assert (tmp_path / "new").is_dir()
    assert not list((tmp_path / "new").iterdir()), "the probe is gone"


def test_free_ports_are_no_concern(tmp_path: Path) -> None:
    check_before(DemoOptions(tmp_path, is_up=True, grpc_port=0, http_port=0))


def test_the_model_is_beside_the_package_or_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (demo_model() / "model.safetensors").is_file()
    monkeypatch.setattr(run, "MODEL_PLACES", (tmp_path / "none",))
    with pytest.raises(ServiceError, match="without the demo model"):
        demo_model()


def test_what_to_type_is_the_script_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "bin" / "python"
    monkeypatch.setattr(run.sys, "executable", str(python))
    assert weft_command() == f"{python} -m cli"
    python.parent.mkdir()
    python.with_name("weft").touch()
    assert weft_command() == str(python.with_name("weft"))
