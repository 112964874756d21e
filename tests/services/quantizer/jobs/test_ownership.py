"""Who is alive, and where the state may lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.quantizer.jobs.ownership import Ownership, StateRefused, check_state_directory

ROOT = Path(__file__).parents[4]


def test_a_service_is_alive_as_long_as_its_lock(tmp_path):
    first, second = Ownership(tmp_path), Ownership(tmp_path)
    assert first.dead([first.owner, second.owner]) == []
    second.release()
    second.release()
    assert first.dead([first.owner, second.owner]) == [second.owner]
    assert first.dead(["../../etc", "0" * 16]) == ["../../etc", "0" * 16]
    first.release()
    assert os.listdir(tmp_path / "owners") == []


def test_a_killed_service_is_dead_at_once(tmp_path):
    script = (
        "import sys, time; from pathlib import Path;"
        "from services.quantizer.jobs.ownership import Ownership;"
        "print(Ownership(Path(sys.argv[1])).owner, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    owner = process.stdout.readline().strip()
    ours = Ownership(tmp_path)
    assert ours.dead([owner]) == []
    process.kill()
    process.communicate()
    assert ours.dead([owner]) == [owner]
    ours.release()


DISK = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
VOLUMES = (
    "30 1 8:1 /docker/volumes/artifacts/_data /artifacts rw - ext4 /dev/sda1 rw\n"
    "31 1 8:1 /docker/volumes/state/_data /state rw - ext4 /dev/sda1 rw\n"
    "32 1 8:1 /docker/volumes/artifacts/_data/inner /again rw - ext4 /dev/sda1 rw\n"
    "33 1 0:50 / /remote rw - nfs4 server:/x rw\n"
    "34 1 0:51 / /other\\040disk rw - ext4 /dev/sdb1 rw\n"
)


@pytest.mark.parametrize(
    ("state", "artifacts", "reason"),
    [
        ("/srv/state", "/srv/artifacts", None),
        ("/state", "/artifacts", None),
        ("/state/jobs", "/artifacts/sub", None),
        ("/other disk/state", "/other disk/artifacts", None),
        ("/artifacts/state", "/artifacts", "in one another"),
        ("/artifacts", "/artifacts", "in one another"),
        ("/srv", "/srv/artifacts", "in one another"),
        ("/artifacts/state", "/artifacts/sub", "on the volume /artifacts"),
        ("/again", "/artifacts", "by way of another mount"),
        ("/docker/volumes/artifacts/_data/state", "/artifacts", "by way of another mount"),
        ("/remote/state", "/artifacts", "nfs4"),
        ("/srv/state", "/remote/artifacts", None),
    ],
)
def test_where_the_state_may_lie(state, artifacts, reason):
    if reason is None:
        check_state_directory(Path(state), Path(artifacts), DISK + VOLUMES)
    else:
        with pytest.raises(StateRefused, match=reason):
            check_state_directory(Path(state), Path(artifacts), DISK + VOLUMES)


def test_links_hide_nothing(tmp_path):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "artifacts")
    with pytest.raises(StateRefused):
        check_state_directory(tmp_path / "state", tmp_path / "artifacts")
    check_state_directory(tmp_path / "apart", tmp_path / "artifacts")
    check_state_directory(tmp_path / "apart", tmp_path / "artifacts", "nonsense\n\n - \n")
