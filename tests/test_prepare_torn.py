"""Files of a data job that a power loss tears: found by their checksums when the job is resumed, and written again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.storage import atomic

RECORDS = [{"n": number * 7919 % 3001, "text": "x" * (number % 50)} for number in range(3000)]


class Stopped(Exception):
    """Raised in the place of a power loss."""


def bad_one(record: dict[str, object]) -> dict[str, object]:
    if record["n"] == 5:
        raise ValueError("set aside")
    return record


def dataset() -> mh.Dataset:
    return mh.Dataset.from_records(RECORDS, partition_bytes=2**14).map(bad_one).sort_by("n").map(dict)


def write(folder: Path) -> mh.PrepareSummary:
    return dataset().write(str(folder), format="jsonl", workers=0, progress=False, max_bad_records=3)


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("undisturbed") / "out").digest


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a job that stopped when all its tasks were done, before anything was published."""

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("manyhands.prepare.job.output.publish", stop)
        with pytest.raises(Stopped):
            write(tmp_path / "out")
    return tmp_path / "out"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zero_a_few_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20:24] = bytes(4)
    path.write_bytes(data)


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


TEARS: list[Callable[[Path], None]] = [truncate, fill_with_zeros, zero_a_few_bytes, make_empty, Path.unlink]


def tasks_run(folder: Path) -> int:
    """How many tasks the last command ran."""
    events = [json.loads(line) for line in (folder / "_events.jsonl").read_text().splitlines()]
    last = max(index for index, event in enumerate(events) if event["event"] == "job started")
    return sum(e["tasks"] - e["done_before"] for e in events[last:] if e["event"] == "stage started")


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("kind", ["*.runs", "*.jsonl", "*.done", "*.bad"])
def test_a_torn_file_is_written_again(interrupted: Path, digest: str, tear: Callable[[Path], None], kind: str) -> None:
    if kind == "*.bad" and tear is not Path.unlink:
        pytest.skip("this file is synced before it gets its name")
    path = sorted((interrupted / ".manyhands").glob(f"*/{kind}"))[0]
    tear(path)
    assert write(interrupted).digest == digest
    assert tasks_run(interrupted) == 1
    assert not (interrupted / ".manyhands").exists()


@pytest.mark.parametrize("tear", TEARS[:4])
def test_a_torn_file_without_its_done_file_is_written_again(
    interrupted: Path, digest: str, tear: Callable[[Path], None]
) -> None:
    for kind in ("*.runs", "*.jsonl"):
        path = sorted((interrupted / ".manyhands").glob(f"*/{kind}"))[0]
        tear(path)
        path.with_suffix(".done").unlink()
    assert write(interrupted).digest == digest
    assert tasks_run(interrupted) == 2


def test_all_files_torn(interrupted: Path, digest: str) -> None:
    for path in (interrupted / ".manyhands").glob("*/part-*"):
        truncate(path)
    assert write(interrupted).digest == digest


@pytest.mark.parametrize("tear", [truncate, fill_with_zeros])
def test_a_torn_file_that_was_moved_to_the_output_is_written_again(
    interrupted: Path, digest: str, tear: Callable[[Path], None]
) -> None:
    moved = []
    for path in sorted((interrupted / ".manyhands").glob("*/*.jsonl"))[:2]:
        shutil.move(path, interrupted / path.name)
        moved.append(interrupted / path.name)
    tear(moved[0])
    assert write(interrupted).digest == digest
    assert tasks_run(interrupted) == 1


def test_a_job_that_was_only_killed_repeats_no_task(interrupted: Path, digest: str) -> None:
    assert write(interrupted).digest == digest
    assert tasks_run(interrupted) == 0


def test_temporary_files_of_a_killed_job_are_deleted(interrupted: Path, digest: str) -> None:
    stage = next((interrupted / ".manyhands").glob("*/*.done")).parent
    for folder in (interrupted, interrupted / ".manyhands", stage):
        atomic.temporary_path(folder / "_manifest.json").write_text("half")
    assert write(interrupted).digest == digest
    assert not list(interrupted.rglob("*.tmp"))


def test_output_files_and_their_folder_are_synced_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    summary = write(tmp_path / "out")
    names = [Path(path).name for path in synced]
    manifest = next(index for index, name in enumerate(names) if name.startswith("._manifest.json."))
    for file in summary.files:
        assert any(name.startswith(f".{file}.") for name in names[:manifest]), file
    assert str(tmp_path / "out") in synced[:manifest]
    assert synced[-1] == str(tmp_path / "out")
    assert not any(".runs." in name or ".done." in name for name in names)
