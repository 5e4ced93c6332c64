"""Zarr stores as the output of data jobs: one task owns each chunk, and the bytes depend on the records alone."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manyhands as mh

zarr = pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")
pytest.importorskip("netCDF4")


CUBE = np.arange(10**6, dtype="f8").reshape(100, 100, 100)


def write(records: Any, folder: Path, layout: mh.ZarrLayout, workers: int = 0, **options: Any) -> mh.PrepareSummary:
    data = records if isinstance(records, mh.Dataset) else mh.Dataset.from_records(records, partition_bytes=1 << 21)
    return data.write(folder, format="zarr", layout=layout, workers=workers, progress=False, **options)


def cube(form: int, **changes: Any) -> mh.ZarrLayout:
    shards = dict.fromkeys("xyz", 50) if form == 3 else {}
    return mh.ZarrLayout(
        **{
            "dims": {"v": ("x", "y", "z")},
            "sizes": dict.fromkeys("xyz", 100),
            "record": ("x", "y", "z"),
            "dtypes": "float64",
            "chunks": dict.fromkeys("xyz", 25),
            "shards": shards,
            "format": form,
            **changes,
        }
    )


def cubes(seed: int, edge: int = 25) -> list[dict[str, Any]]:
    """The cube in pieces, in random order."""
    records = [
        {"x": i, "y": j, "z": k, "v": CUBE[i : i + edge, j : j + edge, k : k + edge]}
        for i, j, k in product(range(0, 100, edge), repeat=3)
    ]
    random.Random(seed).shuffle(records)
    return records


@pytest.mark.parametrize(
    ("form", "workers"),
    [
        (2, (0, 2, 0)),
        (3, (0, 0, 0)),
        pytest.param(2, (1, 2, 3), marks=pytest.mark.slow),
        pytest.param(3, (1, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_any_pieces_and_any_workers_give_the_same_store(
    form: int, workers: tuple[int, int, int], tmp_path: Path
) -> None:
    first = write(cubes(0), tmp_path / "one", cube(form), workers=workers[0])
    others = [
        write(cubes(1), tmp_path / "two", cube(form), workers=workers[1]),
        write(cubes(2, edge=50), tmp_path / "three", cube(form), workers=workers[2]),
    ]
    assert {each.digest for each in others} == {first.digest}
    assert (first.records, others[1].records) == (64, 8)
    for name in ("one", "two", "three"):
        found = zarr.open_group(tmp_path / name, mode="r")["v"][...]
        assert found.sum() == 499999500000.0
        assert np.array_equal(found, CUBE)
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "three")


def files(store: Path) -> dict[str, bytes]:
    """The files of a store, without those of the job."""
    paths = [path for path in store.rglob("*") if path.is_file() and not path.name.startswith("_")]
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("form", "codec"), [(2, "zlib"), (2, "none"), (3, "none"), (3, "zstd")])
def test_chunks_need_not_divide_the_shape(form: int, codec: str, tmp_path: Path) -> None:
    numbers = np.arange(120).reshape(4, 3, 10)
    layout = mh.ZarrLayout(
        dims={"v": ("a", "b", "c")},
        sizes={"a": 4, "b": 3, "c": 10},
        record=("a", "b"),
        dtypes="int64",
        chunks={"a": 3, "b": 2, "c": 5},
        codec=codec,
        format=form,
    )
    rows = [{"a": a, "b": b, "v": numbers[a, b]} for a in range(4) for b in range(3)]
    digest = write(rows, tmp_path / "rows", layout).digest
    assert zarr.open_group(tmp_path / "rows", mode="r")["v"][...].sum() == 7140
    blocks = [{"a": a, "b": 0, "v": numbers[a : a + 2]} for a in (2, 0)]
    assert write(blocks, tmp_path / "blocks", layout).digest == digest
    assert np.array_equal(zarr.open_group(tmp_path / "blocks", mode="r")["v"][...], numbers)


def test_gzip_is_refused() -> None:
    for form in (2, 3):
        with pytest.raises(mh.ConfigError, match="codec of the layout can't be used") as caught:
            cube(form, codec="gzip")
        assert "time of writing" in str(caught.value)


def forecast(**changes: Any) -> mh.ZarrLayout:
    return mh.ZarrLayout(
        **{
            "dims": {"z": ("time", "lead", "lat", "lon")},
            "coords": {
                "time": np.datetime64("2000-01-01T00:35") + np.arange(8) * np.timedelta64(6, "h"),
                "lead": np.array([6, 12], "timedelta64[h]"),
                "lat": [-60.0, 0.0, 60.0],
                "lon": np.arange(4) * 90.0,
            },
            "attrs": {"z": {"units": "m"}, "lat": {"units": "degrees_north"}, "": {"title": "waves"}},
            **changes,
        }
    )


def forecasts() -> Iterator[dict[str, Any]]:
    """One record for each start, with all leads."""
    for step in range(8):
        values = np.arange(24, dtype="f8").reshape(2, 3, 4) + step / 3
        yield {"time": dt.datetime(2000, 1, 1, 0, 35) + step * dt.timedelta(hours=6), "z": values}


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.filterwarnings("error")
def test_forecasts_are_read_by_xarray(form: int, tmp_path: Path) -> None:
    digest = write(forecasts(), tmp_path / "starts", forecast(format=form, chunks={"lead": 1})).digest
    single = forecast(format=form, record=("time", "lead"))
    records = [
        {"time": record["time"], "lead": dt.timedelta(hours=6 * lead + 6), "z": record["z"][lead]}
        for record in forecasts()
        for lead in (1, 0)
    ]
    assert write(records, tmp_path / "leads", single).digest == digest
    found = xr.open_zarr(tmp_path / "leads", chunks=None, decode_timedelta=True)
    assert found.z.dims == ("time", "lead", "lat", "lon")
    assert found.z.dtype == np.float32
    assert np.array_equal(found.z, np.stack([record["z"] for record in forecasts()]).astype("f4"))
    assert found.time.values[-1] == np.datetime64("2000-01-02T18:35")
    assert found.lead.values.tolist() == [6 * 3600 * 10**9, 12 * 3600 * 10**9]
    assert (found.attrs, found.z.attrs, found.lat.attrs) == (
        {"title": "waves"},
        {"units": "m"},
        {"units": "degrees_north"},
    )
    raw = zarr.open_group(tmp_path / "leads", mode="r")["time"]
    assert (raw.dtype, raw.attrs["units"]) == (np.dtype("i8"), "seconds since 1970-01-01 00:00:00")
    again = mh.Dataset.read(tmp_path / "leads").take(9, workers=0)
    assert [record["time"] for record in again] == [record["time"] for record in forecasts()]


def test_times_are_exact_whatever_the_first_one_is(tmp_path: Path) -> None:
    """The first time alone would be whole minutes; a later one needs nanoseconds."""
    times = np.array(["2000-01-01T00:35", "2000-01-02T18:35:00.000000001"], "datetime64[ns]")
    layout = mh.ZarrLayout(dims={"v": ("time",)}, coords={"time": times}, dtypes="int8")
    write([{"time": each, "v": 1} for each in times], tmp_path / "store", layout)
    assert xr.open_zarr(tmp_path / "store", chunks=None).time.values.tolist() == times.tolist()
    with pytest.raises(mh.ConfigError, match="not exact in its units"):
        mh.ZarrLayout(
            dims={"v": ("time",)}, coords={"time": times}, attrs={"time": {"units": "hours since 2000-01-01"}}
        )
    hourly = forecast(attrs={"time": {"units": "minutes since 1900-01-01"}})
    assert hourly.coords["time"].values.dtype == np.dtype("i8")


def test_empty_chunks_are_written(tmp_path: Path) -> None:
    layout = mh.ZarrLayout(dims={"v": ("t", "x")}, sizes={"t": 3, "x": 2}, gaps="fill")
    records = [{"t": 0, "v": np.zeros(2, "f4")}, {"t": 2, "v": np.full(2, np.nan, "f4")}]
    write(records, tmp_path / "store", layout)
    assert {name for name in files(tmp_path / "store") if name.startswith("v/")} >= {"v/0.0", "v/1.0", "v/2.0"}
    found = zarr.open_group(tmp_path / "store", mode="r")["v"][...]
    assert found[0].tolist() == [0, 0]
    assert np.isnan(found[1:]).all()


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize(("kind", "fill"), [("f4", -999.1), ("f8", 1e20), ("i2", -9), ("f2", float("inf"))])
def test_a_given_fill_value_is_missing_for_all_readers(form: int, kind: str, fill: float, tmp_path: Path) -> None:
    layout = mh.ZarrLayout(
        dims={"z": ("t",)},
        sizes={"t": 3},
        dtypes=kind,
        gaps="fill",
        attrs={"z": {"_FillValue": fill}},
        format=form,
    )
    write([{"t": 1, "z": 5}], tmp_path / "store", layout)
    expected = [np.nan, 5, np.nan]
    assert np.array_equal(xr.open_zarr(tmp_path / "store", chunks=None).z, expected, equal_nan=True)
    found = mh.Dataset.read(tmp_path / "store", integers="float").take(3, workers=0)
    assert np.array_equal([record["z"] for record in found], expected, equal_nan=True)
    assert zarr.open_group(tmp_path / "store", mode="r")["z"][0] == np.dtype(kind).type(fill)


def test_true_zeros_stay_zeros_for_xarray(tmp_path: Path) -> None:
    layout = mh.ZarrLayout(dims={"n": ("t",)}, sizes={"t": 3}, dtypes="int32", chunks={"t": 2})
    for form in (2, 3):
        store = tmp_path / str(form)
        write([{"t": t, "n": t} for t in range(3)], store, mh.ZarrLayout(**{**vars_of(layout), "format": form}))
        found = xr.open_zarr(store, chunks=None).n
        assert (found.dtype, found.values.tolist()) == (np.int32, [0, 1, 2])


def vars_of(layout: mh.ZarrLayout) -> dict[str, Any]:
    return {name: getattr(layout, name) for name in ("dims", "sizes", "dtypes", "chunks")}


def test_gaps_and_overlaps_name_the_cell(tmp_path: Path) -> None:
    records = list(forecasts())
    with pytest.raises(mh.DataError, match="no record has a value of a cell") as caught:
        write(records[:3] + records[4:], tmp_path / "gap", forecast())
    assert caught.value.where == "z at time=2000-01-01T18:35:00.000000"
    with pytest.raises(mh.DataError, match="two records have a value of the same cell") as caught:
        write([*records, records[5]], tmp_path / "twice", forecast())
    assert caught.value.where == "z at time=2000-01-02T06:35:00.000000"
    for name in ("gap", "twice"):
        with pytest.raises(Exception, match=r"(?i)no group|not found|unable to find"):
            zarr.open_group(tmp_path / name, mode="r")


def test_packing_that_cannot_hold_a_value_is_an_error(tmp_path: Path) -> None:
    packed = {"dims": {"v": ("t",)}, "sizes": {"t": 3}, "dtypes": "int16", "packing": {"v": {"scale_factor": 0.001}}}
    records = [{"t": 0, "v": 1.2344}, {"t": 1, "v": float("nan")}, {"t": 2, "v": -32.767}]
    for form in (2, 3):
        write(records, tmp_path / str(form), mh.ZarrLayout(**packed, format=form))
        found = xr.open_zarr(tmp_path / str(form), chunks=None).v.values
        assert found[[0, 2]].round(6).tolist() == [1.234, -32.767]
        assert np.isnan(found[1])
        again = [record["v"] for record in mh.Dataset.read(tmp_path / str(form)).take(3, workers=0)]
        assert np.array_equal(again, found, equal_nan=True)
    for value in (40.0, -32.768, float("inf")):
        with pytest.raises(mh.DataError, match=f"the value {value} can't be packed into int16"):
            write([{"t": 0, "v": value}], tmp_path / "bad", mh.ZarrLayout(**packed, gaps="fill"), overwrite=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"time": dt.datetime(1999, 1, 1), "z": np.zeros((2, 3, 4))}, "'time' of the record is datetime"),
        ({"time": np.datetime64("NaT"), "z": np.zeros((2, 3, 4))}, "the time is missing"),
        ({"z": np.zeros((2, 3, 4))}, "no value of 'time'"),
        ({"time": "2000-01-01T00:35", "z": np.zeros((2, 3, 5))}, r"has the shape \(2, 3, 5\)"),
        ({"time": "2000-01-02T18:35", "z": np.zeros((2, 2, 3, 4))}, "has 2 steps from position 7 of 'time'"),
        ({"time": "2000-01-01T00:35", "z": np.full((2, 3, 4), 1e300)}, r"the value 1e\+300 can't be held"),
        ({"time": "2000-01-01T00:35", "z": np.full((2, 3, 4), 2**53 + 1)}, "the value 9007199254740993 can't be held"),
        ({"time": "2000-01-01T00:35", "z": np.zeros((2, 3, 4)), "q": 1}, "'q' of the record is neither a variable"),
        ({"time": "2000-01-01T00:35", "z": np.ma.masked_equal(np.zeros((2, 3, 4)), 0)}, "'z' of the record has masked"),
        ({"time": "2000-01-01T00:35"}, "the record has values of no variable"),
        (7, "a record of a zarr store is a dict"),
    ],
)
def test_a_record_that_does_not_fit_is_named(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(mh.DataError, match=message) as caught:
        write([record], tmp_path / "store", forecast())
    assert caught.value.where == "given records, partition 0, record 1"


@pytest.mark.parametrize(
    "changes",
    [
        {"dims": {}},
        {"dims": {"z": ("time", "time", "lat", "lon")}},
        {"dims": {"z": ("time", "lead", "lat", "lon", "level")}},
        {"dims": {"_z": ("time", "lead", "lat", "lon")}},
        {"record": "step"},
        {"dtypes": "text"},
        {"dtypes": {"q": "float32"}},
        {"chunks": {"time": 0}},
        {"chunks": {"step": 1}},
        {"shards": {"time": 2}},
        {"format": 4},
        {"gaps": "zero"},
        {"attrs": {"q": {}}},
        {"attrs": {"z": {"units": object()}}},
        {"packing": {"z": {"scale_factor": 0.1}}},
        {"dtypes": "int16", "packing": {"z": {"scale_factor": 0.0}}},
        {"dtypes": "int16", "gaps": "fill"},
        {"sizes": {"lat": 7}},
        {"coords": {"time": [1, 2]}},
    ],
)
def test_a_layout_that_cannot_be_used_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(mh.ConfigError):
        forecast(**changes)


def test_arguments_that_do_not_fit_the_format(tmp_path: Path) -> None:
    data = mh.Dataset.from_records([1])
    with pytest.raises(mh.ConfigError, match="needs a layout"):
        data.write(tmp_path / "a", format="zarr")
    with pytest.raises(mh.ConfigError, match="only the format 'zarr' has a layout"):
        data.write(tmp_path / "a", layout=forecast())
    assert "stage 1  stage 0 → write zarr" in data.explain(format="zarr", layout=forecast())
    with pytest.raises(mh.ConfigError, match="coordinate 't' can't be written"):
        mh.ZarrLayout(dims={"v": ("t",)}, coords={"t": np.ma.masked_equal([6, 12], 6)})
    with pytest.raises(mh.ConfigError, match="has equal values"):
        mh.ZarrLayout(dims={"v": ("t",)}, coords={"t": [1, 2, 1]})


def test_a_store_without_steps_and_other_coordinates(tmp_path: Path) -> None:
    layout = mh.ZarrLayout(
        dims={"v": ("time", "level", "x")},
        coords={
            "time": np.array([], "datetime64[s]"),
            "level": ["500 hPa", "1000 hPa"],
            "area": (("level", "x"), np.ones((2, 3))),
        },
        sizes={"x": 3},
    )
    assert write([], tmp_path / "store", layout).records == 0
    found = xr.open_zarr(tmp_path / "store", chunks=None)
    assert found.v.shape == (0, 2, 3)
    assert found.level.values.tolist() == ["500 hPa", "1000 hPa"]
    assert found.area.sum() == 6
    assert "area" in found.coords
    assert mh.Dataset.read(tmp_path / "store").count(workers=0) == 0


def test_an_output_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = write(forecasts(), store, forecast())
    again = write(forecasts(), store, forecast())
    assert (again.digest, again.stages, again.files) == (first.digest, (), first.files)
    other = forecast(format=3, dims={"w": ("time", "lead", "lat", "lon")}, attrs={})
    records = [{"time": record["time"], "w": record["z"]} for record in forecasts()]
    with pytest.raises(mh.ConfigError, match="holds the output of another job"):
        write(records, store, other)
    write(records, store, other, overwrite=True)
    assert sorted(path.name for path in store.iterdir() if path.name[0] != "_") == [
        "lat", "lead", "lon", "time", "w", "zarr.json",
    ]  # fmt: skip
    mh.Dataset.from_records([1]).write(store, overwrite=True, workers=0, progress=False)
    assert sorted(path.name for path in store.iterdir() if path.name[0] != "_") == ["part-00000.jsonl"]
    foreign = tmp_path / "foreign"
    xr.Dataset({"z": ("t", [1.0])}).to_zarr(foreign, zarr_format=2)
    with pytest.raises(mh.ConfigError, match="something that is not an output"):
        write(forecasts(), foreign, forecast(), overwrite=True)


PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np
import manyhands as mh

LOG = sys.argv[2]

def slow(step):
    with open(LOG, "a") as log:
        log.write(f"{step}\\n")
    time.sleep(0.02)
    return {"t": step, "v": np.full((20, 20), step, "f4")}

if __name__ == "__main__":
    layout = mh.ZarrLayout(dims={"v": ("t", "x", "y")}, sizes={"t": 60, "x": 20, "y": 20}, chunks={"t": 4, "x": 7})
    data = mh.Dataset.from_records(range(60), partition_bytes=1).map(slow)
    print(data.write(sys.argv[1], format="zarr", layout=layout, workers=int(sys.argv[3]), progress=False).digest)
"""


@pytest.mark.slow
def test_a_killed_job_goes_on_and_gives_the_same_store(tmp_path: Path) -> None:
    program = tmp_path / "steps.py"
    program.write_text(PROGRAM)

    def start(store: str, workers: int) -> subprocess.Popen[str]:
        arguments = [sys.executable, str(program), str(tmp_path / store), str(tmp_path / f"{store}.log"), str(workers)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)

    def lines(store: str) -> int:
        log = tmp_path / f"{store}.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    killed = start("killed", 2)
    while lines("killed") < 20 and killed.poll() is None:
        time.sleep(0.01)
    assert killed.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    with pytest.raises(Exception, match=r"(?i)no group|not found|unable to find"):
        zarr.open_group(tmp_path / "killed", mode="r")
    before = lines("killed")
    resumed, whole = start("killed", 1), start("whole", 1)
    digests = {process.communicate()[0] for process in (resumed, whole)}
    assert len(digests) == 1
    assert lines("killed") < before + 60  # completed tasks were not repeated
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not (tmp_path / "killed" / ".manyhands").exists()


@pytest.mark.parametrize("moment", ["before variables", "between variables", "before the root", "before the manifest"])
def test_a_job_killed_while_it_publishes_goes_on(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.prepare.job import publishing, store_output

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> Any:
        raise Killed

    rename = os.rename
    renamed: list[Any] = []

    def first_only(source: Any, target: Any) -> None:
        if renamed:
            raise Killed
        renamed.append(target)
        rename(source, target)

    expected = write(forecasts(), tmp_path / "whole", forecast()).digest
    with monkeypatch.context() as patched:
        if moment == "before variables":
            patched.setattr(publishing, "move_store", killed)
        elif moment == "between variables":
            patched.setattr(store_output.os, "rename", first_only)
        elif moment == "before the root":
            patched.setattr(publishing, "write_root", killed)
        else:
            patched.setattr(publishing, "_digest", killed)
        with pytest.raises(Killed):
            write(forecasts(), tmp_path / "store", forecast())
    assert (tmp_path / "store" / ".zmetadata").exists() == (moment == "before the manifest")
    assert write(forecasts(), tmp_path / "store", forecast()).digest == expected
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_killed_publication_leaves_no_root_of_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.prepare.job import publishing

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    write(forecasts(), tmp_path / "whole", forecast(format=3))
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "_digest", killed)
        with pytest.raises((KeyboardInterrupt, mh.Interrupted)):
            write(forecasts(), tmp_path / "store", forecast())
    assert (tmp_path / "store" / ".zmetadata").exists()
    write(forecasts(), tmp_path / "store", forecast(format=3))
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_torn_chunk_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure, a chunk that was renamed may be empty, although the task's note exists."""
    from manyhands.prepare.job import publishing

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    expected = write(forecasts(), tmp_path / "whole", forecast()).digest
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "move_store", killed)
        with pytest.raises((KeyboardInterrupt, mh.Interrupted)):
            write(forecasts(), tmp_path / "store", forecast())
    (chunk,) = (tmp_path / "store" / ".manyhands").rglob("3.0.0.0")
    chunk.write_bytes(b"")
    assert write(forecasts(), tmp_path / "store", forecast()).digest == expected
    assert files(tmp_path / "store") == files(tmp_path / "whole")
