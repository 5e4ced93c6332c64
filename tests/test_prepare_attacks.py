"""Pickles that somebody else wrote into the folders of a data job are never loaded."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import manyhands as mh
from manyhands.prepare.io.run_file import _MAGIC, _TAIL, RunFileWriter, read_index
from manyhands.prepare.job.stages import JobFolder
from manyhands.prepare.plan.plan import Counting, make_plan
from manyhands.prepare.records.chunks import pack
from manyhands.prepare.task import load_plan
from support.evil import Evil

ALONE: Any = {"workers": 0, "progress": False}
RECORDS = mh.Dataset.from_records(["a", "b", "c"])


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Let new files be writable by everybody, unless they are created with other modes."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_files_of_pickles_are_private_whatever_the_umask(tmp_path: Path) -> None:
    job = tmp_path / "out" / ".manyhands"

    def modes(text: str) -> list[int]:
        return [path.stat().st_mode & 0o777 for path in [job, *job.rglob("*.runs")]]

    RECORDS.sort_by(len).map(modes).write(tmp_path / "out", **ALONE)
    (output,) = (tmp_path / "out").glob("part-*")
    assert {tuple(json.loads(line)) for line in output.read_text().splitlines()} == {(0o700, 0o600)}
    assert RECORDS.sort_by(len).cache(tmp_path / "kept").count(**ALONE) == 3
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "kept").glob("part-*")} == {0o600}


def write_evil_runs(path: Path, proof: Path) -> None:
    """Replace a file of records by one whose index is a pickle that creates the folder `proof`."""
    path.unlink()
    with path.open("wb") as file:
        writer = RunFileWriter(file, 1 << 20)
        index = pack(Evil(proof))
        writer._write(index)
        writer._write(_TAIL.pack(len(index), zlib.crc32(index), _MAGIC))


def by_mode(path: Path) -> None:
    path.chmod(0o666)


def by_owner(path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a file to another user")
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize("how", [by_mode, by_owner])
def test_a_strangers_records_are_not_unpickled(tmp_path: Path, how: Callable[[Path], None]) -> None:
    made = RECORDS.cache(tmp_path / "kept")
    assert made.count(**ALONE) == 3
    (kept,) = (tmp_path / "kept").glob("part-*")
    write_evil_runs(kept, tmp_path / "proof")
    how(kept)
    with pytest.raises(mh.DataError, match="a file that may hold code is not yours alone") as caught:
        made.count(**ALONE)
    assert str(kept) in str(caught.value)
    assert not (tmp_path / "proof").exists()


def test_a_fifo_in_place_of_records_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "records")
    with pytest.raises(mh.DataError, match="not yours alone"):
        read_index(str(tmp_path / "records"))


def test_a_plan_that_was_replaced_is_not_loaded(tmp_path: Path) -> None:
    plan = make_plan(RECORDS._node, Counting())
    job = JobFolder(str(tmp_path / "job"))
    path = Path(job.prepare(plan))
    assert load_plan(str(path)).identity == plan.identity
    load_plan.cache_clear()
    path.write_bytes(pickle.dumps(Evil(tmp_path / "proof")))
    with pytest.raises(mh.DataError, match="the job's plan file does not hold the plan that the job saved"):
        load_plan(str(path))
    job.close(delete=True)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("kind", ["writable", "link", "foreign"])
def test_a_strangers_job_folder_is_refused(tmp_path: Path, kind: str) -> None:
    job = tmp_path / "out" / ".manyhands"
    job.parent.mkdir()
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        job.symlink_to(tmp_path / "elsewhere")
    else:
        job.mkdir()
        by_owner(job) if kind == "foreign" else job.chmod(0o777)
    with pytest.raises(mh.ConfigError, match="the folder for temporary files is not yours alone"):
        RECORDS.write(tmp_path / "out", **ALONE)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", 7])
def test_a_manifest_names_only_files_of_its_folder(tmp_path: Path, name: object) -> None:
    made = RECORDS.map(str.upper).cache(tmp_path / "kept")
    made.count(**ALONE)
    path = tmp_path / "kept" / "_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["name"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(mh.ConfigError, match="the output folder holds something that is not an output"):
        made.count(**ALONE)
