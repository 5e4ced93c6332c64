"""Array files: rows and windows equal what was written, wherever files and blocks end. Statistics are exact."""

from __future__ import annotations

import datetime as dt
import json
import math
import pickle
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import manyhands as mh
from manyhands.data import array_format
from manyhands.data.array_file import ArrayFile
from manyhands.data.windows import find_windows
from manyhands.numerics.exact_statistics import ExactStatistics
from manyhands.prepare.records.chunks import size_bytes

ALONE: dict[str, Any] = {"workers": 0, "progress": False}


def written(folder: Path, records: list[dict[str, Any]], files: int = 1, **how: Any) -> str:
    """Write records as arrays into about this many files."""
    made = mh.Dataset.from_records(records, partition_bytes=max(1, -(-size_bytes(records) // files)))
    return made.write(str(folder), format="arrays", **ALONE, **how).path


def steps(times: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"t": time, "x": np.float32([number, -number]), **more} for number, time in enumerate(times)]


def first(data: ArrayFile) -> list[int]:
    return [data.first_row(index) for index in range(len(data))]


def test_case_20_windows(tmp_path: Path) -> None:
    data = mh.ArrayFile(written(tmp_path / "100", steps(range(100)), files=2), length=10, time="t")
    assert len(data._files) == 2
    assert first(data) == list(range(91))
    assert [data[index]["x"][:, 0].tolist() for index in (0, 45, 90)] == [list(range(n, n + 10)) for n in (0, 45, 90)]
    train, test = data.split(row=80)
    assert (len(train), len(test), train.left_out.split + test.left_out.split) == (71, 11, 9)
    assert (first(train)[-1], first(test)[0]) == (70, 80)
    times = [time for time in range(101) if time != 50]
    gap = mh.ArrayFile(written(tmp_path / "gap", steps(times), files=2), length=10, time="t")
    assert first(gap) == [*range(41), *range(50, 91)]
    assert gap.left_out == (10, 0, 0)
    assert gap.report == "82 windows of 10 rows; left out: 10 would hold a missing step (1 gap)"
    assert [first(part)[0] for part in gap.split(row=80)] == [0, 80]
    assert first(gap.split(time=80)[1])[0] == 79
    with pytest.raises(mh.DataError, match="there is a gap in time") as caught:
        mh.ArrayFile(gap.path, length=10, time="t", gaps="error")
    assert (caught.value.where, caught.value.got) == (f"{gap.path}, rows 50 and 51", "49 and 51")


def test_case_20_statistics(tmp_path: Path) -> None:
    values = np.full(1_000_003, 10000.1, np.float32)
    values[[0, 500_000, 1_000_002]] = np.nan
    for count in (1, 3):
        parts = mh.Dataset.from_records(range(count), partition_bytes=8)
        columns = parts.map_batches(
            lambda batch, count=count: {"x": values[int(batch["value"][0]) :: count]}, form="numpy"
        )
        data = mh.ArrayFile(columns.write(tmp_path / f"{count}", format="arrays", **ALONE).path)
        assert (len(data._files), len(data)) == (count, 1_000_003)
        found = data.statistics("x")
        assert (found.mean, found.deviation, found.count, found.missing) == (10000.099609375, 0.0, 1_000_000, 3)
        assert (found.ranges, found.times) == (((0, 1_000_003),), None)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_statistics_are_those_of_fractions(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u8", "?"])))
    rows, channels = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3))
    bits = np.random.default_rng(data.draw(st.integers(0, 2**32))).bytes(rows * channels * dtype.itemsize)
    values = (np.frombuffer(bits, np.uint8) % 2).astype(bool) if dtype.kind == "b" else np.frombuffer(bits, dtype)
    inner = data.draw(st.integers(1, 3))
    values = np.array([values.reshape(rows, channels)] * inner).transpose(1, 2, 0)
    if data.draw(st.booleans()) and dtype.kind == "f":
        values = np.clip(values, -4, 4)
    found = ExactStatistics(channels)
    cut = data.draw(st.integers(0, rows))
    found.add(values[cut:])
    found.add(values[:cut])
    means, deviations = found.results()
    for channel in range(channels):
        column = values[:, channel].ravel().tolist()
        known = [value for value in column if value == value]
        assert (found.count[channel], found.missing[channel]) == (len(known), len(column) - len(known))
        if any(isinstance(value, float) and math.isinf(value) for value in known) or not known:
            assert not math.isfinite(means[channel])
            assert math.isnan(deviations[channel])
            continue
        mean = Fraction(sum(map(Fraction, known)), len(known))
        variance = sum((value - mean) ** 2 for value in map(Fraction, known)) / len(known)
        assert means[channel] == _float(mean)
        assert deviations[channel] == math.sqrt(_float(variance))


@pytest.mark.parametrize("sign", [1, -1])
def test_statistics_of_integers_that_floats_round(sign: int) -> None:
    for dtype in ("i8", "u8") if sign > 0 else ("i8",):
        found = ExactStatistics(1)
        found.add(np.array([[[2**53 + 1, 2**53 - 1]]], dtype) * np.array(sign, dtype))
        assert [each.tolist() for each in found.results()] == [[float(sign * 2**53)], [1.0]]


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def test_statistics_per_channel_cover_only_the_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = [{"t": n, "x": rng.normal(size=(3, 4, 2))} for n in range(20)]
    part, _ = mh.ArrayFile(written(tmp_path / "a", records, files=3), length=2, time="t").split(row=15)
    stacked = np.array([record["x"] for record in records[:15]])
    found = part.statistics("x", axis=0)
    assert (found.ranges, found.times, found.count.tolist()) == (((0, 15),), (0, 14), [120] * 3)
    for channel in range(3):
        exact = Fraction(sum(map(Fraction, stacked[:, channel].ravel().tolist())), 120)
        assert found.mean[channel] == float(exact)
    assert part.statistics("x", axis=(0, -1)).mean.shape == (3, 2)
    assert part.statistics("x", axis=(0, 1, 2)).mean.shape == (3, 4, 2)
    np.testing.assert_allclose(part.statistics("x", axis=(2, 0)).deviation, stacked.std(axis=(0, 2)).T)
    with pytest.raises(mh.ConfigError, match="the arrays lack an axis"):
        part.statistics("x", axis=3)


@settings(max_examples=30, deadline=None)
@given(draw=st.data())
def test_windows_are_those_of_a_plain_search(draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("windows")
    groups = draw.draw(st.lists(st.integers(0, 2), min_size=1, max_size=25).map(sorted))
    jumps = draw.draw(st.lists(st.sampled_from([1, 1, 1, 2, 4]), min_size=len(groups), max_size=len(groups)))
    times = np.cumsum(jumps).tolist()
    length = draw.draw(st.integers(1, 5))
    start = draw.draw(st.integers(0, len(groups) - 1))
    stop = draw.draw(st.integers(start + 1, len(groups)))
    path = written(folder, [{"t": t, "g": g} for t, g in zip(times, groups, strict=True)], draw.draw(st.integers(1, 3)))
    valid = [
        all(
            row + length <= end
            and groups[row] == groups[row + length - 1]
            and times[row + length - 1] - times[row] == length - 1
            for end in [last]
        )
        for last in (stop, len(groups))
        for row in range(len(groups))
    ]
    inside, anywhere = valid[: len(groups)], valid[len(groups) :]
    expected = [row for row in range(start, stop) if inside[row]]
    how: dict[str, Any] = {"length": length, "time": "t", "step": 1, "group": "g", "rows": (start, stop)}
    if not expected:
        with pytest.raises(mh.DataError, match="too few rows for one window"):
            mh.ArrayFile(path, **how)
        return
    found = mh.ArrayFile(path, **how)
    assert first(found) == expected
    for row, item in zip(expected, (found[index] for index in range(len(found))), strict=True):
        assert item["t"].tolist() == times[row : row + length]
    assert found.left_out.split == sum(anywhere[start:stop]) - sum(inside[start:stop])
    in_groups = [groups[start:stop].count(group) for group in set(groups[start:stop])]
    whole = max(0, stop - start - length + 1)
    assert found.left_out.groups == whole - sum(max(0, count - length + 1) for count in in_groups)
    complete = 0
    for group in set(groups[start:stop]):
        of_group = [times[row] for row in range(start, stop) if groups[row] == group]
        complete += max(0, of_group[-1] - of_group[0] + 1 - length + 1)
    assert found.left_out.gaps == complete - len(expected)


@pytest.mark.parametrize("block", [1, 3, 10**6])
def test_rows_of_all_types_come_back_wherever_blocks_end(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_format, "_MOST_ROWS", block)
    kinds = ("f2", ">f4", "u2", "i1", "?")
    records = [
        {
            "flag": number % 2 == 0,
            "number": number,
            "float": number / 3,
            "day": dt.date(2020, 1, 1 + number),
            "time": dt.datetime(2020, 1, 1, number, tzinfo=dt.UTC),
            "lasts": np.timedelta64(number, "ms"),
            **{
                kind: np.arange(number, number + 6).astype(kind).reshape(2, 3)
                for kind in ("f2", ">f4", "u2", "i1", "?")
            },
            "none": np.zeros((0, 2), "f4"),
            "scalar": np.array(number, "u8"),
        }
        for number in range(7)
    ]
    path = written(tmp_path / "a", records, files=2)
    data = mh.ArrayFile(path)
    item = data[4]
    assert item["f2"].dtype == torch.float16
    assert item["u2"].dtype == torch.uint16
    assert item["number"].item() == 4
    assert item["float"].item() == 4 / 3
    assert item["day"].item() == (dt.date(2020, 1, 5) - dt.date(1970, 1, 1)).days
    assert item["time"].item() == int(dt.datetime(2020, 1, 1, 4, tzinfo=dt.UTC).timestamp()) * 10**6
    assert item["none"].shape == (0, 2)
    assert item["scalar"].shape == ()
    for kind in kinds:
        assert item[kind].numpy().tobytes() == records[4][kind].astype(np.dtype(kind).newbyteorder("=")).tobytes()
        assert item[kind].data_ptr() % 64 == 0
    rows = mh.Dataset.read(path).take(9, **ALONE)
    assert [row["number"] for row in rows] == list(range(7))
    assert rows[4][">f4"].tobytes() == records[4][">f4"].astype("f4").tobytes()
    assert rows[4]["none"].shape == (0, 2)
    assert mh.Dataset.read(path, columns=["day"]).take(1, **ALONE) == [{"day": dt.date(2020, 1, 1)}]
    item["f2"] += 1  # an item is a copy
    assert data[4]["f2"][0, 0] == 4
    data.verify()
    for name in array_names(path):
        with Path(path, name).open("rb") as file:
            layout = array_format.read_layout(file, name)
        assert layout.block_rows == min(block, layout.block_rows)
        for number in range(len(layout.columns)):
            assert all(layout.place(number, row)[0] % 64 == 0 for row in range(0, layout.rows, layout.block_rows))


def array_names(path: str | Path) -> list[str]:
    return sorted(file.name for file in Path(path).glob("*.arrays"))


def test_the_bytes_are_the_same_for_any_workers(tmp_path: Path) -> None:
    made = mh.Dataset.from_records(range(40), partition_bytes=80).map(
        lambda n: {"n": n if n != 33 else 0.5, "x": np.full((50, 50), n, "f4")}
    )
    digests = {made.write(tmp_path / f"{n}", format="arrays", workers=n, progress=False).digest for n in (0, 3)}
    assert len(digests) == 1
    assert len(array_names(tmp_path / "0")) > 3
    data = mh.ArrayFile(tmp_path / "3", columns=["n"])
    assert [data[n]["n"].item() for n in (0, 33)] == [0.0, 0.5]  # one type in all files
    assert mh.ArrayFile(tmp_path / "3", columns=("n",)).digest == mh.ArrayFile(tmp_path / "0", columns=["n"]).digest
    assert data.digest != mh.ArrayFile(tmp_path / "3", columns=["n"], rows=(0, 20)).digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rows": (0, 20)}, {"rows": (np.int64(0), torch.tensor(20))}),
        ({"rows": (None, 20)}, {"rows": [None, np.uint8(20)]}),
        ({"length": 3, "seed": 1}, {"length": np.int32(3), "seed": np.int64(1)}),
        ({"group": "t", "share": (0, 0.5)}, {"group": "t", "share": [np.float32(0), np.float64(0.5)]}),
    ],
)
def test_equal_arguments_have_one_digest(one: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "a", steps(range(30)))
    assert mh.ArrayFile(path, **one).digest == mh.ArrayFile(path, **other).digest


def test_every_other_of_many_groups_is_used() -> None:
    groups = 20_000
    ranges = [(row, row + 2) for row in range(0, 2 * groups, 4)]  # every other group
    found = find_windows(ranges, 2 * groups, 1, np.arange(2, 2 * groups, 2), [])
    assert (len(found), found.left_out) == (groups, (0, 0, 0))


def test_datetimes_steps_and_splits_at_a_time(tmp_path: Path) -> None:
    hours = [n for n in range(30) if n not in (10, 11)]
    times = [dt.datetime(2020, 1, 1) + dt.timedelta(hours=6 * n) for n in hours]
    path = written(tmp_path / "a", steps(times))
    data = mh.ArrayFile(path, columns="x", length=4, time="t", step=dt.timedelta(hours=6))
    assert (len(data), data.left_out.gaps, data.time_gaps) == (7 + 15, 5, [(10, 2)])
    assert data[0].shape == (4, 2)
    assert [len(part) for part in data.split(time=dt.datetime(2020, 1, 6))] == [12, 7]
    assert data.split(time="2020-01-06")[1].first_row(0) == 18
    with pytest.raises(mh.DataError, match="too few rows for one window"):
        mh.ArrayFile(path, length=4, time="t", step=dt.timedelta(hours=12))
    dates = [{"t": dt.date(2020, 1, day)} for day in (1, 2, 4, 5)]
    days = mh.ArrayFile(written(tmp_path / "days", dates), length=2, time="t")
    assert (len(days), days.left_out.gaps) == (2, 2)
    floats = mh.ArrayFile(written(tmp_path / "f", steps([n * 0.1 for n in range(50) if n != 20])), length=5, time="t")
    assert (len(floats), floats.left_out.gaps) == (16 + 25, 5)


TIMES: dict[str, tuple[list[Any], list[tuple[Any, int]]]] = {
    "integers": ([1, 80, 81, 2**53, 2**53 + 1], [(80, 1), (80.5, 2), (np.int8(80), 1), (2**53 + 1, 4), (2.0**53, 3)]),
    "floats": ([0.5, 80.0, 2.0**53], [(80, 1), (np.float32(0.75), 1), (2**53 - 1, 2)]),
    "dates": (
        [dt.date(1969, 12, day) for day in (1, 2, 3)] + [dt.date(2020, 1, 2)],
        [
            (dt.date(1969, 12, 2), 1),
            (dt.datetime(1969, 12, 2, 12), 2),
            (dt.datetime(1969, 12, 2, 23, tzinfo=dt.timezone(dt.timedelta(hours=-2))), 3),
            ("1969-12-02T00:00:00.000000001", 2),
            ("2020", 3),
            (np.datetime64("1969-12-01T00:00:01", "ps"), 1),
        ],
    ),
    "differences": (
        [np.timedelta64(number, "ns") for number in (-1, 0, 1)],
        [(dt.timedelta(0), 1), (np.timedelta64(-1, "ps"), 1), (np.timedelta64(1, "ps"), 2)],
    ),
}


@pytest.mark.parametrize("kind", TIMES)
def test_a_time_to_split_at_is_compared_exactly(kind: str, tmp_path: Path) -> None:
    times, cases = TIMES[kind]
    data = mh.ArrayFile(written(tmp_path / "a", [{"t": time} for time in times]), time="t")
    for time, row in cases:
        assert first(data.split(time=time)[1])[0] == row, repr(time)
    for wrong in (np.datetime64("NaT"), np.datetime64("9999", "Y"), "", True):
        with pytest.raises(mh.ConfigError, match="split"):
            data.split(time=wrong)


def test_groups_are_on_one_side_and_windows_do_not_span_them(tmp_path: Path) -> None:
    records = [{"episode": e, "t": s, "x": np.float32([e, s])} for e in range(10) for s in range(5 + e % 3)]
    data = mh.ArrayFile(written(tmp_path / "a", records, files=4), length=3, time="t", group="episode")
    train, test = data.split(share=0.8)
    sides = [{item["episode"][0].item() for item in (part[n] for n in range(len(part)))} for part in (train, test)]
    assert (len(sides[0]), len(sides[1]), sides[0] & sides[1]) == (8, 2, set())
    assert len(train) + len(test) == len(data) == sum(5 + e % 3 - 2 for e in range(10))
    assert data.left_out.groups == 9 * 2
    assert all(len(set(item["episode"].tolist())) == 1 for item in (data[n] for n in range(len(data))))
    parts = [*train.split(share=0.5), test]
    assert sum(map(len, parts)) == len(data)
    other = mh.ArrayFile(data.path, length=3, group="episode", seed=1).split(share=0.8)[1]
    assert {other[n]["episode"][0].item() for n in range(len(other))} != sides[1]
    assert test.statistics("x").count == 2 * sum(5 + e % 3 for e in sides[1])
    with pytest.raises(mh.ConfigError, match="times start again"):
        data.split(time=2.5)


def test_an_array_file_is_pickled_by_its_path(tmp_path: Path) -> None:
    path = written(tmp_path / "a", steps(range(30)))
    data = mh.ArrayFile(path, "x", 4, time="t", rows=(5, 25))
    packed = pickle.dumps(data)
    assert len(packed) < 500
    assert torch.equal(pickle.loads(packed)[3], data[3])
    assert data[3][:, 0].tolist() == [8, 9, 10, 11]
    for index in (-1, len(data)):
        with pytest.raises(IndexError):
            data[index]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"length": 0}, "length is not an integer of at least 1"),
    "seed": ({"seed": 0.5}, "seed is not an integer"),
    "gaps": ({"gaps": "fill"}, "unknown treatment of gaps in time"),
    "a step alone": ({"step": 1}, "a step needs a column of times"),
    "a step of times": ({"time": "t", "step": -1}, "the step of the times can't be used: it is not positive"),
    "a step with a unit": ({"time": "t", "step": dt.timedelta(1)}, "the step of the times can't be used"),
    "half a step": ({"time": "t", "step": 1.5}, "the step of the times can't be used: the times are whole numbers"),
    "a share": ({"share": (0, 0.5)}, "a share of the groups can't be chosen"),
    "rows": ({"rows": (3, 99)}, "the rows are not in the data"),
    "no columns": ({"columns": []}, "columns can't be selected"),
    "a column": ({"columns": ["y"]}, "there is no column 'y'"),
    "a time": ({"time": "x"}, "a column has no numbers or times, one in each row"),
    "windows": ({"length": 31}, "there are too few rows for one window"),
    "order": ({"time": "back"}, "times do not increase from row to row"),
}


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    records = [{**record, "back": -record["t"]} for record in steps(range(30))]
    path = written(tmp_path / "a", records)
    for arguments, message in WRONG.values():
        with pytest.raises((mh.ConfigError, mh.DataError), match=message):
            mh.ArrayFile(path, **arguments)
    data = mh.ArrayFile(path, time="t")
    wrong: list[dict[str, Any]] = [{}, {"row": 3, "share": 0.5}, {"row": 0}, {"row": 30}, {"row": 2.5}]
    wrong += [{"time": "x"}, {"time": math.nan}, {"time": 99}, {"share": 1.5}, {"share": "x"}]
    for arguments in wrong:
        with pytest.raises(mh.ConfigError, match="split"):
            data.split(**arguments)
    nan = mh.Dataset.from_records([{"t": 0.0}, {"t": math.nan}])
    with pytest.raises(mh.DataError, match="a time or group is missing") as caught:
        mh.ArrayFile(nan.write(tmp_path / "nan", format="arrays", **ALONE).path, time="t")
    assert caught.value.where == f"{tmp_path}/nan, row 2, column 't'"
    for dtype in ("f4", "M8[s]"):
        groups = np.array([0, 0, 1], dtype)
        groups[1] = "NaN" if dtype == "f4" else "NaT"
        made = mh.Dataset.from_records([{"g": groups[row, ...]} for row in range(3)])
        folder = made.write(tmp_path / f"groups {dtype}", format="arrays", **ALONE).path
        with pytest.raises(mh.DataError, match="a time or group is missing") as caught:
            mh.ArrayFile(folder, group="g").split(share=0.5)
        assert str(caught.value.where).endswith("row 2, column 'g'")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"column 'x': a value is missing \(null\)"),
        ("text", "it has values of type string"),
        ([1.0], r"it has values of type list<item: double>"),
        (np.zeros((2, 2)), "an array of shape"),
    ],
    ids=["null", "text", "list", "shape"],
)
def test_records_without_arrays_are_refused_with_their_place(value: Any, message: str, tmp_path: Path) -> None:
    good = np.zeros(2) if isinstance(value, np.ndarray) or value is None else value
    for form in ("arrays", "npz"):
        made = mh.Dataset.from_records([{"x": good}, {"x": value}])
        with pytest.raises(mh.DataError, match=message) as caught:
            made.write(tmp_path / form, format=form, **ALONE)
        assert str(caught.value.where).startswith(f"part-00000.{form}, stage 0, partition 0, record")
        if value is None or isinstance(value, np.ndarray):
            assert str(caught.value.where).endswith("record 2")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "a", steps(range(30))))
    file, manifest = path / "part-00000.arrays", path / "_manifest.json"
    content, listed = file.read_bytes(), json.loads(manifest.read_text())
    file.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    with pytest.raises(mh.DataError, match="an array file has changed since it was written"):
        mh.ArrayFile(path).verify()
    file.write_bytes(content[:-1])
    with pytest.raises(mh.DataError, match="the size of an array file has changed"):
        mh.ArrayFile(path)
    column: dict[str, Any] = {"name": "x", "type": "int8", "shape": [1]}
    text = {"columns": [column], "rows": 1, "block_rows": 1}
    forged: list[dict[str, Any]] = [{"rows": 10**12}, {"rows": -1}, {"block_rows": 0}, {"columns": []}]
    forged += [{"columns": [{**column, **wrong}]} for wrong in ({"type": "O"}, {"shape": [-1]}, {"name": 1})]
    for change in forged:
        described = json.dumps({**text, **change}).encode()
        data = bytes(64) + described + struct.pack("<QI16s", len(described), zlib.crc32(described), b"manyhands arrays")
        file.write_bytes(data)
        manifest.write_text(json.dumps({"files": [{"name": file.name, "bytes": len(data)}]}))
        with pytest.raises(mh.DataError, match="an array file is truncated, or is not an array file"):
            mh.ArrayFile(path)
        with pytest.raises(mh.DataError, match="an array file is truncated"):
            mh.Dataset.read(file)
    for name in ("../a/part-00000.arrays", "/etc/passwd", 3):
        manifest.write_text(json.dumps({**listed, "files": [{**listed["files"][0], "name": name}]}))
        with pytest.raises(mh.DataError, match="the manifest of arrays names something"):
            mh.ArrayFile(path)
    file.unlink()
    file.symlink_to("/etc/passwd")
    size = Path("/etc/passwd").stat().st_size
    manifest.write_text(json.dumps({**listed, "files": [{**listed["files"][0], "bytes": size}]}))
    with pytest.raises(mh.DataError, match="an array file can't be read"):
        mh.ArrayFile(path)
    none = mh.Dataset.from_records([]).write(tmp_path / "none", format="arrays", **ALONE)
    for folder in (none.path, tmp_path / "nothing"):
        with pytest.raises(mh.DataError, match="there are no arrays here"):
            mh.ArrayFile(folder)


def test_npz_files_are_read_and_written(tmp_path: Path) -> None:
    records = [{"n": n, "x": np.arange(n, n + 6, dtype="f4").reshape(2, 3), "flag": n > 2} for n in range(5)]
    made = mh.Dataset.from_records(records, partition_bytes=150)
    one, other = (made.write(tmp_path / name, format="npz", workers=workers) for name, workers in (("a", 0), ("b", 2)))
    assert one.digest == other.digest
    assert len(one.files) > 1
    read = mh.Dataset.read(tmp_path / "a" / "*.npz")
    rows = read.take(9, **ALONE)
    assert [row["x"].tobytes() for row in rows] == [record["x"].tobytes() for record in records]
    assert [(row["n"], row["flag"]) for row in rows] == [(n, n > 2) for n in range(5)]
    with np.load(tmp_path / "a" / one.files[0], allow_pickle=False) as loaded:
        assert loaded["x"].dtype == np.float32
        assert loaded["x"].shape[1:] == (2, 3)
    wide = np.arange(24, dtype=">i2").reshape(4, 2, 3)
    arrays = {"f": np.asfortranarray(wide), "s": np.array(["a", "bc", "", "d"]), "t": np.arange(4).astype("M8[s]")}
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    found = mh.Dataset.read(tmp_path / "c.npz", partition_bytes=1).take(9, **ALONE)
    assert [row["f"].tobytes() for row in found] == [row.tobytes() for row in wide.astype("i2")]
    assert (found[1]["s"], found[1]["t"]) == ("bc", dt.datetime(1970, 1, 1, 0, 0, 1))
    np.savez(tmp_path / "d.npz", x=np.arange(1000), y=np.zeros((1000, 0)))
    many = mh.Dataset.read(tmp_path / "d.npz", partition_bytes=800)
    assert many.map(lambda row: row["x"]).take(2000, **ALONE) == list(range(1000))
    assert many._as_shard.num_shards == 10
    selected = mh.Dataset.read(tmp_path / "d.npz", columns=["x"]).take(1, **ALONE)
    assert selected == [{"x": 0}]


def test_npz_files_that_are_not_records_are_refused(tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "objects": {"x": np.array([{}, []], object)},
        "no dimensions": {"x": np.float32(1)},
        "lengths": {"x": np.zeros(2), "y": np.zeros(3)},
        "structured": {"x": np.zeros(2, "i4,f4")},
        "complex": {"x": np.zeros(2, "c8")},
        "nothing": {},
    }
    for name, arrays in wrong.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(mh.DataError, match="an npz file can't be read as records"):
            mh.Dataset.read(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "good.npz", x=np.arange(10**4))
    data = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "flip.npz").write_bytes(data[:5000] + b"\xff" + data[5001:])
    with pytest.raises(mh.DataError, match="it is truncated or damaged"):
        mh.Dataset.read(tmp_path / "cut.npz")
    with pytest.raises(mh.DataError, match="it is truncated or damaged"):
        mh.Dataset.read(tmp_path / "flip.npz").count(**ALONE)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        return self.line(x)


def loss(model: Any, batch: Any) -> Any:
    return ((model(batch["x"][:, :-1]) - batch["x"][:, 1:]) ** 2).mean()


def train(folder: str, steps: int = 3) -> str:
    torch.manual_seed(0)
    data = mh.ArrayFile(folder, columns=["x"], length=3, time="t").split(row=40)[0]
    scale = data.statistics("x", axis=0)

    def collate(items: list[Any]) -> Any:
        x = torch.stack([item["x"] for item in items])
        return {"x": (x - torch.tensor(scale.mean)).float() / torch.tensor(scale.deviation).float()}

    recipe = mh.Recipe(
        model=Line,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        data=data,
        collate=collate,
        batch=mh.Batch(global_size=12, micro_size=4),
    )
    return mh.train(recipe, steps=steps).digest


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_model_is_trained_on_windows_with_the_same_bits_by_any_workers(workers: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a", steps([n for n in range(60) if n != 20]), files=2)
    assert set(mh.launch(train, path, workers=workers)) == {train(path)}
