"""A hub id as source, against an endpoint of our own that tells the truth, breaks off, or lies."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.quantizer.errors import QuantizerError
from services.quantizer.sources import local_source

constants = pytest.importorskip("huggingface_hub").constants

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"


class FakeHub:
    """Serves `files` as org/name at COMMIT, and notes who asked for what. The other attributes are how it
    misbehaves.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.large = ("safetensors",)  # kept with LFS, told by sha256
        self.requests: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        self.status: int | None = None
        self.error_code: str | None = None
        self.truncate: dict[str, int] = {}  # name -> bytes after which the connection breaks, once
        self.other_bytes: dict[str, bytes] = {}
        self.listing: list[dict] | None = None
        self.sha = COMMIT
        self.redirect: str | None = None
        self.delay_s = 0.0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def siblings(self):
        entries = []
        for name, data in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": name, "size": len(data), "blobId": git}
            if name.endswith(self.large):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 130}
            entries.append(entry)
        return entries

    def answer(self, request):
        time.sleep(self.delay_s)
        wanted = request.headers.get("Range")
        self.requests.append((request.path, wanted, request.headers.get("Authorization")))
        if self.status is not None:
            headers = {"X-Error-Code": self.error_code} if self.error_code else {}
            return self.send(request, self.status, b"{}", headers)
        path = request.path.split("?")[0]
        if path.startswith("/api/models/org/name/revision/"):
            siblings = self.siblings() if self.listing is None else self.listing
            body = {"id": "org/name", "sha": self.sha, "siblings": siblings}
            return self.send(request, 200, json.dumps(body).encode())
        prefix = f"/org/name/resolve/{COMMIT}/"
        if not path.startswith(prefix):
            return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        name = path.removeprefix(prefix)
        if self.redirect:
            return self.send(request, 302, b"", {"Location": f"{self.redirect}{path}"})
        data = self.other_bytes.get(name, self.files[name])
        begin = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        broken_at = self.truncate.pop(name, None)
        return self.send(request, 206 if begin else 200, data[begin:], headers, broken_at)

    def send(self, request, status, body, headers=None, broken_at=None):
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body if broken_at is None else body[:broken_at])
        request.close_connection = broken_at is not None

    def downloads(self):
        return [path.rsplit("/", 1)[1] for path, _, _ in self.requests if "/resolve/" in path]


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    fake.files = {
        "config.json": b'{"a": 1}',
        "tokenizer.json": b"{}",
        "model.safetensors": bytes(range(256)) * 4096,
        "pytorch_model.bin": b"\x80\x04never",
        "modeling_evil.py": b"raise SystemExit",
        "README.md": b"words",
        "sub/config.json": b"{}",
    }
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def fetch(tmp_path):
    """fetch(revision) -> (directory, commit) of org/name through a cache of the test's own."""
    return lambda revision=COMMIT: local_source(Path("org/name"), revision, tmp_path / "cache")


def test_only_the_files_that_are_read_come_and_they_come_once(hub, fetch, tmp_path):
    directory, commit = fetch()
    assert commit == COMMIT
    assert directory == tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    assert {p.name for p in directory.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert os.readlink(directory / "config.json").startswith("../../blobs/")
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "tokenizer.json"]
    fetch()
    assert len(hub.downloads()) == 3


def test_a_tag_becomes_the_commit_it_is_now(hub, fetch):
    directory, commit = fetch("v1.0")
    assert (directory.name, commit) == (COMMIT, COMMIT)
    assert hub.requests[0][0].startswith("/api/models/org/name/revision/v1.0")


def test_shards_are_those_of_the_index(hub, fetch):
    data = hub.files.pop("model.safetensors")
    hub.files |= {
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "x-1.safetensors"}}).encode(),
        "x-1.safetensors": data,
        "consolidated.safetensors": data,
    }
    directory, _ = fetch()
    assert "consolidated.safetensors" not in hub.downloads()
    assert (directory / "x-1.safetensors").read_bytes() == data


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, fetch, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what is lost at most
    hub.truncate["model.safetensors"] = 300_000
    directory, _ = fetch()
    assert (directory / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    ranges = [r for path, r, _ in hub.requests if path.endswith("model.safetensors") and r]
    assert len(ranges) == 1
    assert 0 < int(ranges[0].removeprefix("bytes=").rstrip("-").split("-")[0]) <= 300_000


def test_a_process_that_ended_is_taken_up_where_it_ended(hub, fetch, tmp_path):
    data = hub.files["model.safetensors"]
    blobs = tmp_path / "cache" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.weft-partial").write_bytes(data[:1000])
    directory, _ = fetch()
    assert (directory / "model.safetensors").read_bytes() == data
    assert [r for path, r, _ in hub.requests if path.endswith("model.safetensors")] == ["bytes=1000-"]


def complaint(fetch, revision=COMMIT):
    with pytest.raises(QuantizerError) as caught:
        fetch(revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_revision_it_says_how(hub, fetch):
    assert "--revision" in complaint(fetch, None)
    assert not hub.requests


@pytest.mark.parametrize("revision", ["../main", "a..b", "", "-x", "a b", "a\nb"])
def test_revisions_that_are_none(hub, fetch, revision):
    assert "--revision" in complaint(fetch, revision)
    assert not hub.requests


def test_a_directory_has_no_revision(tmp_path):
    with pytest.raises(QuantizerError, match="is a directory"):
        local_source(tmp_path, COMMIT, None)
    assert local_source(tmp_path, None, None) == (tmp_path, None)


@pytest.mark.parametrize("text", ["/no/such", "../org/name", "org", "a/b/c", "org/..", ".hidden/name"])
def test_what_is_no_hub_id_is_left_to_the_reader(text):
    assert local_source(Path(text), None, None) == (Path(text), None)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "no such model"),
        (401, "RepoNotFound", "no such model"),
        (404, "RevisionNotFound", "no such revision"),
        (403, "GatedRepo", "HF_TOKEN"),
        (401, None, "HF_TOKEN"),
        (418, None, "status 418"),
    ],
)
def test_refusals_of_the_hub_in_one_line(hub, fetch, status, code, words):
    hub.status, hub.error_code = status, code
    assert words in complaint(fetch)


def test_offline_with_and_without_the_cache(hub, fetch, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in complaint(fetch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    directory, _ = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == (directory, COMMIT)
    assert "HF_HUB_OFFLINE" in complaint(fetch, "v1.0")  # what a tag means, only the hub knows
    (directory / "model.safetensors").unlink()
    assert "HF_HUB_OFFLINE" in complaint(fetch)


def test_nobody_listens(hub, fetch):
    hub.server.shutdown()
    hub.server.server_close()
    assert "ConnectError" in complaint(fetch)


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_hub_in_trouble(hub, fetch, monkeypatch, is_slow):
    """One that answers too late, or with 503: the cache will do, if it holds the commit."""
    directory, _ = fetch()
    if is_slow:
        monkeypatch.setattr("services.quantizer.hub._TIMEOUT_S", 0.1)
        hub.delay_s = 0.5
    else:
        hub.status = 503
    assert fetch() == (directory, COMMIT)
    (directory / "model.safetensors").unlink()
    assert ("Timeout" if is_slow else "status 503") in complaint(fetch)


def lie(hub, name, **changes):
    hub.listing = [{**e, **changes} if e["rfilename"] == name else e for e in hub.siblings()]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda h: lie(h, "config.json", size=5), "longer than 5 bytes"),
        (lambda h: lie(h, "config.json", size=50), "size"),
        (lambda h: lie(h, "config.json", size=-1), "size and digest of config.json"),
        (lambda h: lie(h, "config.json", size=None), "size and digest of config.json"),
        (lambda h: lie(h, "config.json", size="8"), "size and digest of config.json"),
        (lambda h: lie(h, "config.json", blobId="../../x"), "size and digest of config.json"),
        (lambda h: lie(h, "model.safetensors", size=1 << 60), "are free"),
        (lambda h: lie(h, "tokenizer.json", size=1 << 40), "too many"),
        (lambda h: h.other_bytes.update({"config.json": b'{"a": 2}'}), "digest"),
        (lambda h: setattr(h, "sha", "f" * 40), "the hub answers for"),
        (lambda h: setattr(h, "sha", "main"), "the hub answers for"),
        (lambda h: setattr(h, "sha", "../../x"), "the hub answers for"),
        (lambda h: h.files.pop("config.json"), "no config.json"),
        (lambda h: h.files.pop("model.safetensors"), "pickled"),
        (lambda h: setattr(h, "listing", []), "no config.json"),
        (lambda h: setattr(h, "listing", "what"), "org/name"),
        (lambda h: setattr(h, "listing", [{}]), "org/name"),
    ],
)
def test_lies_are_found(hub, fetch, spoil, words, tmp_path):
    spoil(hub)
    assert words in complaint(fetch)
    assert not list(tmp_path.glob("cache/**/*.safetensors"))


@pytest.mark.parametrize("name", ["../x.safetensors", "a/b.safetensors", "x.bin", ".x.safetensors", 5, None])
def test_an_index_that_names_what_is_no_shard(hub, fetch, name):
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    assert "weight_map" in complaint(fetch)


def test_an_index_that_names_a_file_that_is_not_there(hub, fetch):
    del hub.files["model.safetensors"]
    index = json.dumps({"weight_map": {"a": "gone.safetensors"}}).encode()
    hub.files["model.safetensors.index.json"] = index
    assert "gone.safetensors" in complaint(fetch)


def test_paths_in_the_listing_are_not_asked_for(hub, fetch, tmp_path):
    evil = {"rfilename": "../x.safetensors", "size": 1, "blobId": "0" * 40}
    hub.listing = [*hub.siblings(), evil, {**evil, "rfilename": "/etc/x.safetensors"}]
    directory, _ = fetch()
    assert len(list(directory.iterdir())) == 3
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_redirect_elsewhere_gets_no_token_and_must_bring_the_right_bytes(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    elsewhere = FakeHub()
    elsewhere.files = dict(hub.files)
    # Another name of this machine: a port alone would be another origin as well.
    hub.redirect = elsewhere.endpoint.replace("127.0.0.1", "localhost")
    fetch()
    assert {authorization for _, _, authorization in hub.requests} == {f"Bearer {TOKEN}"}
    assert {authorization for _, _, authorization in elsewhere.requests} == {None}
    elsewhere.server.shutdown()


def test_what_lies_in_the_place_of_a_link_is_not_followed(hub, fetch, tmp_path):
    directory, _ = fetch()
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("/etc/passwd")
    assert "not what this commit holds" in complaint(fetch)


def test_a_run_by_hub_id_equals_the_run_on_the_directory(hub, make_checkpoint, tmp_path):
    source = make_checkpoint()
    hub.files = {path.name: path.read_bytes() for path in source.iterdir()}

    def run(*flags):
        command = [sys.executable, "-m", "services.quantizer", "run", "--artifacts", str(tmp_path / "a"),
                   "--name", "m", "--samples", "2", "--sequence-length", "64", "--evaluation-tokens", "0",
                   "--group-size", "32", "--threads", "1", *flags]  # fmt: skip
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert TOKEN not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.splitlines()[0])

    cache = str(tmp_path / "cache")
    path = run("--source", "org/name", "--revision", "v1", "--hub-cache", cache)
    told = json.loads((path / "run.json").read_text())
    assert told["revision"] == COMMIT
    assert "models--org--name" in told["source"]
    assert run("--source", str(source)) == path
    assert hub.requests[0][2] == f"Bearer {TOKEN}"
