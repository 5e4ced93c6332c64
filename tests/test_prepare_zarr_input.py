"""zarr stores and netCDF files as the input of data jobs: nothing is lost, rounded or taken for missing."""

from __future__ import annotations

import datetime as dt
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manyhands as mh

zarr = pytest.importorskip("zarr")
numcodecs = pytest.importorskip("numcodecs")
xr = pytest.importorskip("xarray")
pytest.importorskip("netCDF4")

pytestmark = pytest.mark.filterwarnings(
    "ignore::zarr.errors.ZarrUserWarning", "ignore:numpy.ndarray size:RuntimeWarning"
)


def winds(steps: int = 10, start: str = "2000-01-01") -> Any:
    """A data set as a weather model writes it."""
    times = np.datetime64(start, "ns") + np.arange(steps) * np.timedelta64(6, "h")
    values = np.arange(steps * 12, dtype="f4").reshape(steps, 3, 4)
    return xr.Dataset(
        {
            "u": (("time", "lat", "lon"), values, {"units": "m s-1", "long_name": "eastward wind"}),
            "mean": ("time", values.mean(axis=(1, 2)).astype("f8")),
            "land": (("lat", "lon"), np.ones((3, 4), "i1")),
        },
        {"time": times, "lat": ("lat", [-60.0, 0.0, 60.0], {"units": "degrees_north"}), "lon": np.arange(4) * 90.0},
        {"title": "winds"},
    )


def records(path: Any, **options: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = mh.Dataset.read(path, **options).take(10_000, workers=0)
    return found


def save(data: Any, path: Path) -> Path:
    kind = path.suffix
    if kind == ".zarr":
        data.to_zarr(path, zarr_format=3 if "3" in path.stem else 2, consolidated=False)
    else:
        data.to_netcdf(path, engine="netcdf4", format="NETCDF3_64BIT" if "3" in path.stem else "NETCDF4")
    return path


@pytest.mark.parametrize("name", ["a.zarr", "a3.zarr", "a.nc", "a3.nc"])
def test_each_step_is_a_record(name: str, tmp_path: Path) -> None:
    data = winds()
    path = save(data, tmp_path / name)
    found = records(path)
    names = ["mean", "u"] if path.suffix == ".zarr" else ["u", "mean"]  # in the order of the file
    assert [list(record) for record in found] == [["time", *names]] * 10
    assert found[3]["time"] == dt.datetime(2000, 1, 1, 18)
    assert found[3]["u"].dtype == np.float32
    assert np.array_equal(np.stack([record["u"] for record in found]), data.u)
    assert [record["mean"] for record in found] == data["mean"].values.tolist()
    by_latitude = records(path, record="lat", columns=["u"])
    assert np.array_equal(np.stack([record["u"] for record in by_latitude]), data.u.transpose("lat", "time", "lon"))
    with pytest.raises(mh.DataError, match="'land' has no dimension 'time'"):
        mh.Dataset.read(path, columns=["u", "land"])
    with pytest.raises(mh.DataError, match="no variable 'v'"):
        mh.Dataset.read(path, columns=["v"])


def test_partitions_are_groups_of_whole_chunks(tmp_path: Path) -> None:
    data = winds(20)[["u"]]
    data.to_zarr(tmp_path / "a.zarr", zarr_format=2, encoding={"u": {"chunks": (4, 2, 4)}})
    for size, count in ((1, 5), (500, 3), (1 << 20, 1)):
        read = mh.Dataset.read(tmp_path / "a.zarr", partition_bytes=size)
        assert read.num_shards == count
        assert np.array_equal(np.stack([record["u"] for record in read]), data.u)
    read.write(tmp_path / "copy", format="zarr", layout=read.layout(), workers=0, progress=False)
    copy = xr.open_zarr(tmp_path / "copy", chunks=None)
    assert copy.identical(data)
    assert (copy.attrs, copy.u.attrs) == ({"title": "winds"}, data.u.attrs)


@pytest.mark.parametrize("form", [2, 3])
def test_a_fill_value_does_not_make_a_value_missing(form: int, tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "a", zarr_format=form)
    array = array_in(group, "n", np.arange(5, dtype="i4"), fill_value=0)
    array[...] = np.arange(5)
    found = records(tmp_path / "a")
    assert [record["n"] for record in found] == [0, 1, 2, 3, 4]
    table = mh.Dataset.read(tmp_path / "a").map_batches(lambda table: [str(table.schema.field("n").type)])
    assert table.take(1, workers=0) == ["int32"]


def array_in(group: Any, name: str, values: Any, dims: Any = ("t",), **options: Any) -> Any:
    """An array whose chunks have not been written."""
    options = {"chunks": values.shape, "attributes": {}, **options}
    if group.metadata.zarr_format == 2:
        options["attributes"]["_ARRAY_DIMENSIONS"] = list(dims)
    else:
        options["dimension_names"] = list(dims)
    return group.create_array(name, shape=values.shape, dtype=values.dtype, **options)


@pytest.mark.parametrize("form", [2, 3])
def test_absent_chunks_are_counted_or_an_error(form: int, tmp_path: Path) -> None:
    store = tmp_path / "a"
    array = array_in(zarr.create_group(store, zarr_format=form), "v", np.zeros(4, "f4"), chunks=(2,), fill_value=-1.5)
    array[:2] = [1, 2]
    data = mh.Dataset.read(store, partition_bytes=1)
    assert [record["v"] for record in data] == [1, 2, -1.5, -1.5]
    summary = data.write(tmp_path / "out", workers=0, progress=False)
    assert summary.absent_chunks == 1
    assert "1 chunks absent" in str(summary)
    assert data.write(tmp_path / "out", workers=0).absent_chunks == 1  # it exists already
    key = "v/1" if form == 2 else "v/c/1"
    with pytest.raises(mh.DataError, match="never written") as caught:
        records(store, absent="error")
    assert caught.value.where == str(store / key)


def test_absent_chunks_of_shards_are_not_searched_for(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "a", zarr_format=3)
    array = array_in(group, "v", np.zeros(4, "f4"), chunks=(1,), shards=(2,), fill_value=-1)
    array[0] = 5
    assert [record["v"] for record in records(tmp_path / "a")] == [5, -1, -1, -1]
    with pytest.raises(mh.DataError, match="absent chunks of 'v' can't be found, because it has shards"):
        mh.Dataset.read(tmp_path / "a", absent="error")


@pytest.mark.parametrize("chunks", [(2,), (1,)])
@pytest.mark.parametrize("form", [2, 3])
def test_coordinates_that_were_never_written_are_an_error(form: int, chunks: tuple[int], tmp_path: Path) -> None:
    """They would all be equal to the fill value. A single value that is equal to it is not stored by xarray."""
    data = xr.Dataset({"v": (("t", "x"), np.ones((4, 2)))}, {"t": np.arange(4), "x": np.arange(2)})
    encoding = {"t": {"chunks": chunks}, "x": {"chunks": chunks}}
    data.to_zarr(tmp_path / "a", zarr_format=form, encoding=encoding)
    assert [record["t"] for record in records(tmp_path / "a")] == [0, 1, 2, 3]
    assert mh.Dataset.read(tmp_path / "a").layout().coords["x"].values.tolist() == [0, 1]
    name = "{}/c/{}" if form == 3 else "{}/{}"
    last = {"x": 0 if chunks == (2,) else 1, "t": 1 if chunks == (2,) else 3}
    for dim in ("t", "x"):
        shutil.copytree(tmp_path / "a", tmp_path / dim)
        (tmp_path / dim / name.format(dim, last[dim])).unlink()
        with pytest.raises(mh.DataError, match=f"values of the coordinate '{dim}' were never written"):
            records(tmp_path / dim)
        with pytest.raises(mh.DataError, match=f"values of the coordinate '{dim}' were never written"):
            mh.Dataset.read(tmp_path / dim).layout()


@pytest.mark.parametrize("chunk", [1, 10**13])
def test_sizes_beyond_memory_end_with_an_error(chunk: int, tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "a", zarr_format=2)
    array_in(group, "v", np.zeros((2, 3), "f4"), ("t", "x"))[...] = 1
    array_in(group, "x", np.zeros(3), ("x",))[...] = np.arange(3)
    edit(tmp_path / "a/x/.zarray", lambda metadata: metadata.update(shape=[10**13], chunks=[chunk]))
    with pytest.raises(mh.DataError, match="coordinate 'x' has too many values"):
        mh.Dataset.read(tmp_path / "a")
    shutil.rmtree(tmp_path / "a/x")
    edit(tmp_path / "a/v/.zarray", lambda metadata: metadata.update(shape=[2, 10**15], chunks=[1, chunk]))
    what = "has too many chunks" if chunk == 1 else "of a zarr store does not fit in memory"
    with pytest.raises(mh.DataError, match=f"variable 'v' {what}"):
        records(tmp_path / "a", partition_bytes=1)


def test_only_not_found_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from manyhands.prepare.gridded import zarr_store

    save(winds(), tmp_path / "a.zarr")
    opened = zarr_store.open_file

    def denied(root: str, key: str) -> Any:
        if key == "u/0.0.0":
            raise PermissionError(13, "Permission denied")
        return opened(root, key)

    monkeypatch.setattr(zarr_store, "open_file", denied)
    with pytest.raises(mh.DataError, match="Permission denied") as caught:
        records(tmp_path / "a.zarr")
    assert caught.value.where == str(tmp_path / "a.zarr/u/0.0.0")


def edit(file: Path, change: Any) -> None:
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))


@pytest.mark.parametrize("place", ["compressor", "filters", "codecs", "shards", "coordinate"])
def test_codecs_that_execute_code_are_refused(place: str, tmp_path: Path) -> None:
    """numcodecs has a codec "pickle", which anyone who writes the metadata of an array can name."""
    form = 3 if place in ("codecs", "shards") else 2
    group = zarr.create_group(tmp_path / "a", zarr_format=form)
    shards = {"shards": (2,)} if place == "shards" else {}
    array_in(group, "v", np.zeros(4), ("x",), chunks=(1,), **shards)[...] = 1
    array_in(group, "x", np.arange(4.0), ("x",))[...] = np.arange(4.0)
    evil: Any = {"id": "pickle", "protocol": 5} if form == 2 else {"name": "numcodecs.pickle", "configuration": {}}
    file = tmp_path / "a" / ("x" if place == "coordinate" else "v") / (".zarray" if form == 2 else "zarr.json")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(ran),)

    def change(metadata: dict[str, Any]) -> None:
        if place == "codecs":
            metadata["codecs"].append(evil)
        elif place == "shards":
            metadata["codecs"][0]["configuration"]["codecs"].append(evil)
        else:
            metadata |= {"filters": [evil], "compressor": None} if place == "filters" else {"compressor": evil}

    edit(file, change)
    for chunk in [path for path in file.parent.rglob("*") if path.name[0].isdigit() and path.is_file()]:
        chunk.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(mh.DataError, match="uses a codec that is not supported") as caught:
        records(tmp_path / "a")
    assert caught.value.where == str(file)
    assert "pickle" in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["link", "broken link", "FIFO", "metadata"])
def test_only_regular_files_inside_a_store_are_read(kind: str, tmp_path: Path) -> None:
    save(winds(), tmp_path / "a.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "a.zarr")
    assert len(records(tmp_path / "link.zarr")) == 10
    file = tmp_path / "a.zarr" / ("u/.zarray" if kind == "metadata" else "u/0.0.0")
    outside = file.rename(tmp_path / "outside")
    if kind == "FIFO":
        os.mkfifo(file)
    else:
        file.symlink_to(file.parent / "missing" if kind == "broken link" else outside)
    with pytest.raises(mh.DataError, match="a file of a zarr store can't be read") as caught:
        records(tmp_path / "a.zarr")
    assert caught.value.where == str(file)


@pytest.mark.parametrize("codec", ["blosc", "zstd", "zlib", "none"])
def test_a_truncated_chunk_is_named(codec: str, tmp_path: Path) -> None:
    """blosc itself reads beyond the end of a truncated chunk, and returns whatever is there."""
    codecs = {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd(), "zlib": numcodecs.Zlib(), "none": None}
    encoding = {"u": {"chunks": (2, 3, 4), "compressors": codecs[codec]}}
    winds()[["u"]].to_zarr(tmp_path / "a.zarr", zarr_format=2, encoding=encoding)
    chunk = tmp_path / "a.zarr/u/3.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(mh.DataError, match=r"can't be decoded|is truncated") as caught:
        records(tmp_path / "a.zarr")
    assert caught.value.where == str(chunk)


def test_a_changed_chunk_is_noticed(tmp_path: Path) -> None:
    save(winds(), tmp_path / "a.zarr")
    data = mh.Dataset.read(tmp_path / "a.zarr")
    chunk = tmp_path / "a.zarr/u/0.0.0"
    os.utime(chunk, ns=(0, 0))
    with pytest.raises(mh.DataError, match="has changed since it was listed"):
        data.count(workers=0)
    assert mh.Dataset.read(tmp_path / "a.zarr").identity != data.identity


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_each_file_is_decoded_by_its_own_attributes(suffix: str, tmp_path: Path) -> None:
    for name, start, packing in (("a", 0, (0.5, 0.0)), ("b", 4, (0.25, 10.0))):
        attributes = {"scale_factor": packing[0], "add_offset": packing[1]}
        packed = xr.Dataset({"v": ("t", np.arange(4, dtype="i2"), attributes)}, {"t": np.arange(start, start + 4)})
        save(packed, tmp_path / f"{name}{suffix}")
    data = mh.Dataset.read(tmp_path / f"*{suffix}")
    assert [record["v"] for record in data] == [0, 0.5, 1, 1.5, 10, 10.25, 10.5, 10.75]
    layout = data.layout()
    assert layout.attrs["v"] == {}
    data.write(tmp_path / "out", format="zarr", layout=layout, workers=0, progress=False)
    assert xr.open_zarr(tmp_path / "out", chunks=None).v.values.tolist() == [record["v"] for record in data]


def test_missing_values(tmp_path: Path) -> None:
    fills = {"_FillValue": np.int16(-1)}
    data = xr.Dataset(
        {
            "packed": ("t", np.array([1, -1, 3], "i2"), {**fills, "scale_factor": np.float32(0.5)}),
            "whole": ("t", np.array([1, 2, 3], "i2"), fills),
            "some": ("t", np.array([1, -1, 3], "i2"), {"missing_value": np.int16(-1)}),
            "float": ("t", np.array([1, 9.0, 3], "f4"), {"_FillValue": np.float32(9)}),
            "unsigned": ("t", np.array([1, -2, -1], "i1"), {"_Unsigned": "true"}),
        }
    )
    for name in ("a.nc", "a3.nc"):
        path = save(data, tmp_path / name)
        packed, floats = (columns_of(records(path, columns=[name]))[name] for name in ("packed", "float"))
        assert np.array_equal(packed, [0.5, np.nan, 1.5], equal_nan=True)
        assert np.array_equal(floats, [1, np.nan, 3], equal_nan=True)
        assert columns_of(records(path, columns=["whole", "unsigned"])) == {
            "t": [0, 1, 2],
            "whole": [1, 2, 3],
            "unsigned": [1, 254, 255],
        }
        with pytest.raises(mh.DataError, match="'some' has integers, and 1 of 3 values are missing"):
            records(path)
        some = columns_of(records(path, columns=["some"], integers="float"))["some"]
        assert np.array_equal(some, [1, np.nan, 3], equal_nan=True)


@pytest.mark.parametrize(
    ("kinds", "marked", "expected"),
    [
        (("i2", "i4"), (True, True), "f8"),
        (("i2", "i2"), (True, False), "f4"),
        (("i2", "i4"), (False, True), "f8"),
        (("i2", "f4"), (False, False), "f4"),
    ],
)
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_missing_integers_of_several_files_share_a_float_type(
    suffix: str, kinds: tuple[str, str], marked: tuple[bool, bool], expected: str, tmp_path: Path
) -> None:
    paths = []
    for name, kind, has_missing in zip("ab", kinds, marked, strict=True):
        values = np.array([[7, -1 if has_missing else 5]], kind)
        attributes = {"missing_value": np.dtype(kind).type(-1)} if has_missing else {}
        variable = xr.Variable(("t", "x"), values, attributes)
        paths.append(save(xr.Dataset({"v": variable}), tmp_path / f"{name}{suffix}"))
    data = mh.Dataset.read(paths, integers="float")
    found = [record["v"] for record in data]
    assert [each.dtype for each in found] == [np.dtype(expected)] * 2
    wanted = [[7, np.nan if each else 5] for each in marked]
    assert np.array_equal(found, wanted, equal_nan=True)
    assert data.layout().dtypes == {"v": np.dtype(expected).str}
    if suffix == ".zarr" and kinds == ("i2", "i2"):  # the fill value decides the type, too
        group = zarr.create_group(tmp_path / "c", zarr_format=2)
        array_in(group, "v", values, ("t", "x"), fill_value=5)[...] = values
        data = mh.Dataset.read(tmp_path / "c", integers="float", fill_value="missing")
        assert np.array_equal([record["v"] for record in data], [[7, np.nan]], equal_nan=True)
        assert data.layout().dtypes == {"v": "<f4"}


def test_an_integer_that_no_float_holds_ends_the_job(tmp_path: Path) -> None:
    save(xr.Dataset({"v": ("t", np.array([2**63 - 1]))}), tmp_path / "a.nc")
    save(xr.Dataset({"v": ("t", np.array([0.5]))}), tmp_path / "b.nc")
    with pytest.raises(mh.DataError, match="the integer 9223372036854775807 is not exact as a float"):
        records([tmp_path / "a.nc", tmp_path / "b.nc"], integers="float")


def columns_of(found: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [record[name] for record in found] for name in found[0]}


def test_a_fill_value_that_may_mean_missing_is_asked_about(tmp_path: Path) -> None:
    """xarray writes _FillValue as the fill value of an array of format 2, where it can't be told from a default."""
    data = xr.Dataset({"v": ("t", np.array([1.0, np.nan, 3.0]))})
    encoding = {"v": {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -99}}
    data.to_zarr(tmp_path / "a.zarr", zarr_format=2, encoding=encoding)
    with pytest.raises(mh.DataError, match="holds its fill value -99"):
        records(tmp_path / "a.zarr")
    missing = columns_of(records(tmp_path / "a.zarr", fill_value="missing"))["v"]
    assert np.array_equal(missing, data.v, equal_nan=True)
    assert columns_of(records(tmp_path / "a.zarr", fill_value="value"))["v"] == [1.0, -49.5, 3.0]
    data.to_zarr(tmp_path / "b3.zarr", zarr_format=3, encoding=encoding, consolidated=False)
    assert np.array_equal(columns_of(records(tmp_path / "b3.zarr"))["v"], data.v, equal_nan=True)


def test_coordinates_that_differ(tmp_path: Path) -> None:
    one = winds(5)
    shifted = winds(5, "2000-02-01")
    shifted["lon"] = shifted.lon + np.array([0, 0, 1e-14 * 180, 0])
    one.to_netcdf(tmp_path / "a.nc", engine="netcdf4")
    shifted.to_netcdf(tmp_path / "b.nc", engine="netcdf4")
    with pytest.raises(mh.DataError, match="different coordinates along 'lon'") as caught:
        mh.Dataset.read(tmp_path / "*.nc")
    assert "position 2" in str(caught.value)
    assert "difference is" in str(caught.value)
    assert len(records(tmp_path / "*.nc", tolerance=1e-9)) == 10
    fewer = winds(5).isel(lat=slice(2))
    fewer.to_netcdf(tmp_path / "c.nc", engine="netcdf4")
    with pytest.raises(mh.DataError, match="different dimensions of 'u'"):
        mh.Dataset.read(tmp_path / "*.nc", tolerance=1e-9)
    other = winds(5)
    other.u.attrs["units"] = "knots"
    other.to_netcdf(tmp_path / "c.nc", engine="netcdf4")
    with pytest.raises(mh.DataError, match="different units of 'u'"):
        mh.Dataset.read(tmp_path / "*.nc", tolerance=1e-9)
    flags = winds(5).assign(u=lambda data: data.u.astype("i4"))
    flags.to_netcdf(tmp_path / "c.nc", engine="netcdf4")
    with pytest.raises(mh.DataError, match=r"different (types|units) of 'u'"):
        mh.Dataset.read(tmp_path / "*.nc", tolerance=1e-9)


def with_calendar(calendar: str, first: int = 0) -> Any:
    attributes = {"units": "days since 2001-02-27", "calendar": calendar}
    return xr.Dataset({"v": ("time", np.arange(4.0))}, {"time": ("time", np.arange(first, first + 4), attributes)})


def test_calendars_are_kept_and_never_mixed(tmp_path: Path) -> None:
    save(with_calendar("360_day"), tmp_path / "a.nc")
    save(with_calendar("360_day", 4), tmp_path / "b.nc")
    data = mh.Dataset.read([tmp_path / "a.nc", tmp_path / "b.nc"])
    assert [record["time"] for record in data][2:5] == [
        "2001-02-29T00:00:00",
        "2001-02-30T00:00:00",
        "2001-03-01T00:00:00",
    ]
    data.write(tmp_path / "out.zarr", format="zarr", layout=data.layout(), workers=0, progress=False)
    found = zarr.open_group(tmp_path / "out.zarr", mode="r")["time"]
    assert (found.attrs["calendar"], found.dtype) == ("360_day", np.dtype("i8"))
    again = mh.Dataset.read(tmp_path / "out.zarr")
    assert [record["time"] for record in again] == [record["time"] for record in data]
    for name, calendar in (("c.nc", "noleap"), ("d.nc", "standard")):
        save(with_calendar(calendar), tmp_path / name)
    with pytest.raises(mh.DataError, match="different calendars of 'time'") as caught:
        mh.Dataset.read([tmp_path / "c.nc", tmp_path / "d.nc"])
    assert "c.nc" in str(caught.value)
    assert "d.nc" in str(caught.value)


def test_odd_stores(tmp_path: Path) -> None:
    """Nested groups, text coordinates, no coordinate, big-endian values, scalars, and no steps at all."""
    group = zarr.create_group(tmp_path / "a", zarr_format=2)
    array_in(group, "v", np.zeros((3, 2), ">f8"), ("x", "y"), fill_value=0)[...] = np.arange(6).reshape(3, 2)
    array_in(group, "scalar", np.zeros((), "f4"), (), chunks=())[...] = 1
    array_in(group, "name", np.zeros(3, "<U3"), ("x",))[...] = ["ab", "cde", ""]
    found = records(tmp_path / "a", record="x")
    assert [(record["x"], record["name"], record["v"].tolist()) for record in found] == [
        (0, "ab", [0, 1]),
        (1, "cde", [2, 3]),
        (2, "", [4, 5]),
    ]
    assert found[0]["v"].dtype.isnative
    nested = zarr.create_group(tmp_path / "nested", zarr_format=3)
    array_in(nested.create_group("inner"), "v", np.zeros(2))[...] = 1
    with pytest.raises(mh.DataError, match="has no arrays") as caught:
        mh.Dataset.read(tmp_path / "nested", format="zarr")
    assert "nested/inner" in str(caught.value)
    assert len(records(tmp_path / "nested/inner")) == 2
    empty = winds(10).isel(time=slice(0))
    for name in ("e.zarr", "e.nc"):
        assert records(save(empty, tmp_path / name)) == []
    unlimited = winds(3)
    unlimited.to_netcdf(tmp_path / "u.nc", engine="netcdf4", unlimited_dims=["time"])
    assert len(records(tmp_path / "u.nc")) == 3
    mixed = xr.Dataset({"a": ("x", [1.0]), "b": ("y", [1.0])})
    with pytest.raises(mh.DataError, match="share no dimension"):
        mh.Dataset.read(save(mixed, tmp_path / "m.nc"))


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.nc").write_bytes(b"not netCDF")
    with pytest.raises(mh.DataError, match="a netCDF file can't be opened"):
        mh.Dataset.read(tmp_path / "a.nc")
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(mh.DataError, match="a zarr store can't be opened"):
        mh.Dataset.read(tmp_path / "a.zarr")
    (tmp_path / "a.jsonl").write_text("1\n")
    with pytest.raises(mh.ConfigError, match="applies to zarr and netCDF only"):
        mh.Dataset.read(tmp_path / "a.jsonl", record="time")
    with pytest.raises(mh.ConfigError, match="can't be read together with other files"):
        mh.Dataset.read([tmp_path / "a.jsonl", tmp_path / "a.nc"])
    with pytest.raises(mh.ConfigError, match="read from disks only"):
        mh.Dataset.read("memory://winds.nc", format="netcdf")
    for options in ({"absent": "no"}, {"tolerance": -1}, {"record": 3}, {"what": 1}):
        with pytest.raises(mh.ConfigError):
            mh.Dataset.read(tmp_path / "a.nc", **options)  # type: ignore[arg-type]
    with pytest.raises(mh.ConfigError, match="only a Dataset that reads zarr or netCDF has a layout"):
        mh.Dataset.from_records([1]).layout()


def test_a_store_at_an_address(tmp_path: Path) -> None:
    import fsspec

    data = winds()
    save(data, tmp_path / "a.zarr")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "a.zarr"), "/stored/a.zarr", recursive=True)
    try:
        read = mh.Dataset.read("memory://stored/a.zarr", columns=["u"])
        assert np.array_equal(np.stack([record["u"] for record in read]), data.u)
        layout = read.layout(chunks={"time": 4})
        there = read.write("memory://stored/b.zarr", format="zarr", layout=layout, workers=0, progress=False)
        here = read.write(tmp_path / "b.zarr", format="zarr", layout=layout, workers=0, progress=False)
        assert there.digest == here.digest
        again = mh.Dataset.read("memory://stored/b.zarr")
        assert np.array_equal(np.stack([record["u"] for record in again]), data.u)
    finally:
        memory.rm("/stored", recursive=True)


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    data = mh.Dataset.from_records([{"t": 0, "v": 1.0}])
    layout = mh.ZarrLayout(dims={"v": ("t",)}, sizes={"t": 1})
    data.write(tmp_path / "a", format="zarr", layout=layout, workers=0, progress=False)
    read = mh.Dataset.read(tmp_path / "a")
    with pytest.raises(mh.ConfigError, match="holds an input of the job"):
        read.write(tmp_path / "a", format="zarr", layout=layout, workers=0, overwrite=True)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(mh.DataError):
        read.count(workers=0)
