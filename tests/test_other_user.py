"""What another user of this machine, or a host with another address, can do: real users and network namespaces."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import manyhands as mh
from manyhands.prepare.job.stages import JobFolder
from manyhands.prepare.plan.plan import Counting, make_plan
from manyhands.prepare.task import load_plan
from support.evil import Evil
from support.hosts import hosts
from test_faults import MANYHANDS, SUPPORT
from test_hosts import ENVIRONMENT, needs_hosts
from test_prepare_attacks import write_evil_runs

ALONE: Any = {"workers": 0, "progress": False}
RECORDS = mh.Dataset.from_records(["a", "b", "c"])
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]

as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="only root can start commands as another user, with setpriv (util-linux)",
)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like /tmp: everybody may create files in it. It is outside of `tmp_path`, which is private."""
    with tempfile.TemporaryDirectory(prefix="shared-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield folder


def nobody(script: str, *arguments: object) -> None:
    """Run a shell script as the user nobody."""
    subprocess.run([*NOBODY, "sh", "-euc", script, "sh", *map(str, arguments)], check=True, timeout=30)


def attack(data: Path, proof: Path) -> Path:
    """Write a pickle that creates the folder `proof`; everybody may read it."""
    data.write_bytes(pickle.dumps(Evil(proof)))
    data.chmod(0o644)
    return data


@as_root
@pytest.mark.parametrize("mode", ["0700", "0777"])
def test_a_folder_for_temporary_files_that_another_user_has_created_is_refused(shared: Path, mode: str) -> None:
    nobody('mkdir -m "$2" "$1"', shared / f"manyhands-{os.getuid()}", mode)
    for job in (lambda: RECORDS.count(**ALONE), lambda: RECORDS.cache()):
        with pytest.raises(mh.ConfigError, match="the folder for temporary files is not yours alone"):
            job()


@as_root
def test_a_plan_that_another_user_has_written_is_not_loaded(shared: Path, tmp_path: Path) -> None:
    """In a job folder that this user had created open to everybody."""
    proof = tmp_path / "proof"
    evil = attack(shared / "evil", proof)
    plan = make_plan(RECORDS._node, Counting())
    job = JobFolder(str(shared / "job"))
    path = Path(job.prepare(plan))
    path.parent.chmod(0o777)
    nobody('rm -f "$2" && cp "$1" "$2"', evil, path)
    assert path.stat().st_uid == 65534
    with pytest.raises(mh.DataError, match="does not hold the plan that the job saved"):
        load_plan(str(path))
    job.close(delete=True)
    assert not proof.exists()


@as_root
def test_records_that_another_user_has_written_are_not_unpickled(shared: Path, tmp_path: Path) -> None:
    proof, kept = tmp_path / "proof", shared / "kept"
    assert RECORDS.cache(kept).count(**ALONE) == 3
    (part,) = kept.glob("part-*")
    evil = shared / "evil"
    evil.touch()
    write_evil_runs(evil, proof)
    evil.chmod(0o644)
    kept.chmod(0o777)
    nobody('rm -f "$2" && cp "$1" "$2"', evil, part)
    with pytest.raises(mh.DataError, match="a file that may hold code is not yours alone"):
        RECORDS.cache(kept).count(**ALONE)
    assert not proof.exists()


@as_root
def test_a_job_folder_that_another_user_has_created_is_refused(shared: Path, tmp_path: Path) -> None:
    """In an output folder to which everybody may write."""
    proof, output = tmp_path / "proof", shared / "out"
    output.mkdir()
    output.chmod(0o777)
    evil = attack(shared / "evil", proof)
    nobody('mkdir "$2" && cp "$1" "$2/plan"', evil, output / ".manyhands")
    with pytest.raises((mh.ConfigError, mh.DataError), match="not yours alone"):
        RECORDS.sort_by(len).write(output, **ALONE)
    assert not proof.exists()


REACHES = """
import socket, sys
for address in sys.argv[1:]:
    try:
        socket.create_connection((address, 29400), 5).close()
        print("reached", address)
    except OSError as error:
        print(type(error).__name__, address)
"""


@needs_hosts
@pytest.mark.slow
def test_the_rendezvous_is_not_reachable_at_another_address_of_the_host(tmp_path: Path) -> None:
    with hosts(2) as (first, stranger):
        first.add_address("10.77.0.101")
        waits = ["train", str(SUPPORT / "faulty.toml"), "--workers", "1", "--hosts", "2"]
        where = ["--rendezvous", f"{first.address}:29400", "--run-dir", str(tmp_path / "run")]
        launcher = first.start([*MANYHANDS, *waits, *where], tmp_path / "first", ENVIRONMENT)
        deadline = time.monotonic() + 60
        found = ""
        while f"reached {first.address}" not in found:  # the launcher is starting
            assert launcher.poll() is None, (tmp_path / "first").read_text()
            assert time.monotonic() < deadline
            tries = tmp_path / "tries"
            tries.unlink(missing_ok=True)
            stranger.start([sys.executable, "-c", REACHES, first.address, "10.77.0.101"], tries).wait(30)
            found = tries.read_text()
        assert found.splitlines() == [f"reached {first.address}", "ConnectionRefusedError 10.77.0.101"]
