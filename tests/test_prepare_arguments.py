"""Preparing data: arguments, folders and values that can't be used are refused with an error that says so."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manyhands as mh
from manyhands.prepare.job.output import private_folder

ALONE: dict[str, Any] = {"workers": 0, "progress": False}

RECORDS: Any = mh.Dataset.from_records([{"a": 1}])

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "sort_by(1)": (lambda: RECORDS.sort_by(1), "the key of sort_by can't be used"),
    "sort_by([])": (lambda: RECORDS.sort_by([]), "the key of sort_by can't be used"),
    "group_by([1])": (lambda: RECORDS.group_by(["a", 1]), "the key of group_by can't be used"),
    "distinct(bytes)": (lambda: RECORDS.distinct(b"a"), "the key of distinct can't be used"),
    "a set of keys": (lambda: RECORDS.join(RECORDS, {"a"}), "the key of join can't be used"),
    "other_on": (lambda: RECORDS.join(RECORDS, "a", other_on=3), "the key of join can't be used"),
    "join([1])": (lambda: RECORDS.join([1], "a"), "join needs another Dataset"),
    "schema={}": (lambda: RECORDS.write("unused", format="parquet", schema={}), "schema is not an Arrow schema"),
    "schema of text": (lambda: RECORDS.write("unused", schema="a"), "schema is not an Arrow schema"),
    "sample": (lambda: RECORDS.sample("x"), "fraction is not between 0 and 1"),
    "a seed": (lambda: RECORDS.shuffle(1.5), "seed is not an integer"),
    "partition_bytes": (lambda: RECORDS.repartition(partition_bytes=1.5), "partition_bytes is not an integer"),
    "partition_bytes=0": (lambda: mh.Dataset.from_records([1], partition_bytes=0), "partition_bytes is not an integer"),
    "types": (lambda: mh.Dataset.read("x.csv", types={"a": 1}), "types can't be used"),  # type: ignore[dict-item]
    "a folder": (lambda: RECORDS.write(3), "a folder is not a path"),
    "a cache": (lambda: RECORDS.cache(3), "a folder is not a path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_wrong_types_are_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(mh.ConfigError, match=message):
        call()


NANOSECONDS = np.datetime64("2024-01-01T00:00:00.123456789")


@pytest.mark.parametrize(
    "value",
    [NANOSECONDS, [(NANOSECONDS,)], np.datetime64("NaT", "us"), NANOSECONDS.astype("M8[ps]")],
    ids=["value", "nested", "missing", "picoseconds"],
)
def test_times_that_json_would_change_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(mh.DataError, match="a NumPy time is missing or finer than a microsecond"):
        mh.Dataset.from_records([0]).map(lambda _: {"t": value, "n": 2**70}).write(tmp_path / "out", **ALONE)


def test_whole_microseconds_and_other_numpy_values_are_written(tmp_path: Path) -> None:
    record = {
        "t": NANOSECONDS.astype("M8[us]").astype("M8[ns]"),
        "f": np.float32(0.1),
        "i": np.int8(2),
        "b": np.True_,
    }
    mh.Dataset.from_records([0]).map(lambda _: record).write(tmp_path / "out", **ALONE)
    expected = '{"t":"2024-01-01T00:00:00.123456","f":0.1,"i":2,"b":true}\n'
    assert (tmp_path / "out" / "part-00000.jsonl").read_text() == expected


@pytest.mark.parametrize("what", ["writable", "link", "file", "owner"])
def test_a_temporary_folder_that_others_can_change_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"manyhands-{os.getuid()}"
    if what == "link":
        folder.symlink_to(tmp_path / "other")
    elif what == "file":
        folder.touch()
    elif what == "writable":
        folder.mkdir()
        folder.chmod(0o770)
    else:
        folder.mkdir()
        if os.getuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(folder, 65534, 65534)
    for job in (lambda: RECORDS.count(**ALONE), lambda: RECORDS.cache()):
        with pytest.raises(mh.ConfigError, match="the folder for temporary files is not yours alone"):
            job()


def test_the_temporary_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert private_folder().stat().st_mode & 0o777 == 0o700
    assert RECORDS.count(**ALONE) == 1
