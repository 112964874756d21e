"""The gateway of components/tls and components/keys: its probes by hand answer, and callers need a key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from tests.deploy.kubernetes_manifests import ROOT, main_container, manifests, one
from tests.deploy.running import DEMO, Process, Running
from weft.v1 import gateway_service_pb2 as gateway_pb
from weft.v1.gateway_service_pb2_grpc import GatewayServiceStub

pytest.importorskip("cryptography")

from tests.weft.rpc.certificates import Authority


def test_its_probes_and_keys(running: Running, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.sign("gateway", dns=("gateway",), addresses=())
    made = subprocess.run(
        [sys.executable, "-m", "weft.rpc.auth", "new", "somebody"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    (tmp_path / "clients").write_text(
        next(x for x in made.stdout.split() if x.startswith("somebody:")) + "\n"
    )
    (tmp_path / "engine-key").write_text("not-asked-for\n")
    places = {
        "/tls/tls.crt": str(pair.cert),
        "/tls/tls.key": str(pair.key),
        "/tls/ca.crt": str(authority.ca),
        "/keys/clients": str(tmp_path / "clients"),
    }
    container = main_container(one(manifests("cpu", "keys+one-node+sessions+tls"), "Deployment", "gateway"))
    flags = [word for word in container["args"] if any(word.endswith(f"={place}") for place in places)]
    assert len(flags) == 3
    flags = [f"{flag}={places[place]}" for flag, _, place in (word.partition("=") for word in flags)]
    where = ["--tokenizer", DEMO, "--engine", running.engine_grpc, "--listen", "127.0.0.1:0"]
    gateway = Process("services.gateway", *where, *flags)
    try:
        address = gateway.wait_for("serving")["address"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            words = [places.get(word, word) for word in container[name]["exec"]["command"]]
            words = [word.replace("/tls/ca.crt", places["/tls/ca.crt"]) for word in words]
            words = [sys.executable, *words[1:]]
            words[words.index("127.0.0.1:50052")] = address
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (0, "SERVING\n"), (name, done.stderr)
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        options = [("grpc.ssl_target_name_override", "gateway")]
        with grpc.secure_channel(address, credentials, options) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                GatewayServiceStub(channel).ListModels(gateway_pb.ListModelsRequest(), timeout=30)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    finally:
        gateway.kill()
