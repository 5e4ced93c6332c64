"""Bad input: named with file, line and reason, set aside up to a limit, never dropped silently."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.prepare.io.run_file import read_blocks, read_index
from manyhands.prepare.job.stages import JobFolder
from manyhands.prepare.plan.fingerprint import fingerprint_code
from manyhands.prepare.plan.plan import Output, make_plan
from manyhands.prepare.task import runs_path

LINES = [json.dumps({"n": number}) for number in range(1, 101)]


def refused(made: mh.Dataset, what: str, folder: Path, **how: Any) -> mh.ManyhandsError:
    """The error of a job; no output is there."""
    with pytest.raises(mh.ManyhandsError, match=what) as caught:
        made.write(str(folder / "out"), workers=0, progress=False, **how)
    assert not (folder / "out" / "_manifest.json").exists()
    return caught.value


def set_aside(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "out" / "_bad_records.jsonl").read_text().splitlines()]


def test_broken_json_is_reported_with_its_line_in_any_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*LINES[:76], '{"n": 77', "", *LINES[77:]]) + "\n")
    made = mh.Dataset.read(str(path), partition_bytes=200)
    error = refused(made, "the line is not JSON", tmp_path)
    assert error.where == f"{path}, line 77"
    assert error.got == '{"n": 77'
    written = made.write(str(tmp_path / "out"), workers=0, max_bad_records=1)
    assert (written.records, written.bad_records) == (99, 1)
    assert set_aside(tmp_path)[0]["where"] == f"{path}, line 77"


def test_invalid_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    for name, good, bad in (("a.txt", b"fine", b"caf\xe9"), ("a.jsonl", b'"fine"', b'"caf\xe9"')):
        path = tmp_path / name
        path.write_bytes(b"\n".join([good, bad, good]) + b"\n")
        error = refused(mh.Dataset.read(str(path)), "the line is not UTF-8 text", tmp_path)
        assert error.where == f"{path}, line 2"
        assert error.got is not None
        assert "caf\\xe9" in error.got
        assert mh.Dataset.read(str(path)).take(9, max_bad_records=1) == ["fine", "fine"]


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_truncated_compressed_file_is_refused_whatever_the_limit(tmp_path: Path, kind: str) -> None:
    data = "\n".join(LINES).encode() * 50
    whole = gzip.compress(data) if kind == "gzip" else pa.compress(data, kind, asbytes=True)
    path = tmp_path / f"a.jsonl.{'gz' if kind == 'gzip' else 'zst'}"
    path.write_bytes(whole[:-20])
    error = refused(
        mh.Dataset.read(str(path)), f"a {kind} file is truncated or damaged", tmp_path, max_bad_records=10**6
    )
    assert error.where == str(path)


def test_an_error_in_a_function_is_reported_with_the_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES))

    def invert(row: dict[str, int]) -> float:
        return 1 / (row["n"] - 42)

    made = mh.Dataset.read(str(path)).map(invert).flat_map(lambda x: [x, x])
    error = refused(
        made, r"invert raised ZeroDivisionError: division by zero \(.*test_prepare_input.py:\d+\)", tmp_path
    )
    assert (error.where, error.got) == (f"{path}, line 42", "{'n': 42}")
    written = made.write(str(tmp_path / "out"), workers=0, max_bad_records=1)
    assert written.records == 198
    assert set_aside(tmp_path)[0]["record"] == "{'n': 42}"


def test_bad_records_of_all_tasks_count_towards_the_limit(tmp_path: Path) -> None:
    made = mh.Dataset.from_records(list(range(40)), partition_bytes=80).map(lambda x: 1 // (x % 10))
    error = refused(made, "4 bad records are more than max_bad_records allows", tmp_path, max_bad_records=3)
    assert error.expected == "at most 3"
    assert made.count(workers=0, max_bad_records=4) == 36


@pytest.mark.parametrize("key", [None, math.nan, (1, None)])
@pytest.mark.parametrize("way", ["group", "sort", "join"])
def test_a_key_that_is_none_or_nan_is_a_bad_record(tmp_path: Path, key: Any, way: str) -> None:
    good: Any = (0, 0) if isinstance(key, tuple) else 0.0
    records = [{"k": good, "n": 1}, {"k": key, "n": 2}, {"k": good, "n": 3}]
    made = mh.Dataset.from_records(records)
    made = {
        "group": lambda: made.group_by("k").aggregate(n=mh.Aggregate.count()),
        "sort": lambda: made.sort_by("k"),
        "join": lambda: made.join(made, on=lambda row: row["k"]),
    }[way]()
    error = refused(made, "the key is (None|NaN)", tmp_path)
    assert error.where == "given records, partition 0, record 2"
    made.write(str(tmp_path / "out"), workers=0, max_bad_records=1)
    assert len(set_aside(tmp_path)) == 1


def test_a_null_in_a_tables_key_column_is_a_bad_record(tmp_path: Path) -> None:
    pq.write_table(pa.table({"k": [1, None, 3], "v": [1, 2, 3]}), tmp_path / "a.parquet")
    made = mh.Dataset.read(str(tmp_path / "a.parquet"))
    for arranged in (made.sort_by("k"), made.group_by("k").aggregate(n=mh.Aggregate.sum(of="v"))):
        assert refused(arranged, "the key is None", tmp_path).where == f"{tmp_path}/a.parquet, row 2"
        assert arranged.count(workers=0, max_bad_records=1) == 2


def test_keys_and_values_of_a_wrong_type_are_reported(tmp_path: Path) -> None:
    mixed = mh.Dataset.from_records([1, "one"])
    refused(mixed.sort_by(), "keys of different types can't be sorted", tmp_path)
    rows = mh.Dataset.from_records([{"a": 1}])
    assert "has no column 'b'" in str(refused(rows.sort_by("b"), "the record has no column", tmp_path))
    refused(mixed.sort_by("b"), "the record has no columns: it is a int, not a dict", tmp_path)
    refused(rows.group_by().aggregate(n=mh.Aggregate.count()), "the key is a dict", tmp_path)
    nothing = mh.Dataset.from_records([{"a": None}])
    refused(nothing.group_by(lambda row: 1).aggregate(n=mh.Aggregate.sum(of="a")), "the value to aggregate", tmp_path)
    (tmp_path / "a.csv").write_text("shop,amount\nx,1.5\nx,2\n")
    read = mh.Dataset.read(tmp_path / "a.csv").group_by("shop")
    for way in (mh.Aggregate.sum, mh.Aggregate.mean, mh.Aggregate.variance):
        error = refused(read.aggregate(n=way("amount")), r"the value to aggregate \(.*\) is text", tmp_path)
        assert error.where == f"{tmp_path}/a.csv, line 2"
    refused(mh.Dataset.from_records([object()]).distinct(), "can't be compared by its content", tmp_path)


def test_records_that_an_output_cannot_hold_are_reported(tmp_path: Path) -> None:
    refused(mh.Dataset.from_records([{1, 2}]), "a record can't be written as JSON", tmp_path)
    refused(mh.Dataset.from_records(["a", 1]), "a record can't be written as text", tmp_path, format="text")
    refused(mh.Dataset.from_records(["a\nb"]), "a record can't be written as a line of text", tmp_path, format="text")
    mixed = mh.Dataset.from_records([{"a": 1}, {"a": "x"}])
    refused(mixed, "the records can't be put into columns", tmp_path, format="parquet")
    schema = pa.schema([("a", pa.int64())])
    more = mh.Dataset.from_records([{"a": 1, "b": 2}])
    refused(more, "column 'b' of the records isn't in the schema", tmp_path, format="parquet", schema=schema)


def test_late_columns_of_parquet_are_not_lost(tmp_path: Path) -> None:
    made = mh.Dataset.from_records([{"a": 1}, {"a": 2, "b": 3}])
    made.write(str(tmp_path / "out"), format="parquet", workers=0)
    assert mh.Dataset.read(str(tmp_path / "out")).take(9) == [{"a": 1, "b": None}, {"a": 2, "b": 3}]


def test_files_with_wrong_content_are_reported(tmp_path: Path) -> None:
    with pytest.raises(mh.DataError, match="no file matches") as caught:
        mh.Dataset.read(str(tmp_path / "*.jsonl"))
    assert caught.value.where == str(tmp_path / "*.jsonl")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "2.parquet")
    with pytest.raises(mh.DataError, match="a file has different columns than the first one") as caught:
        mh.Dataset.read(str(tmp_path / "*.parquet"))
    assert caught.value.where == str(tmp_path / "2.parquet")
    assert caught.value.got == "a: string"
    (tmp_path / "3.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(mh.DataError, match="a Parquet file can't be read"):
        mh.Dataset.read(str(tmp_path / "3.parquet"))
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(mh.ConfigError, match="the format of a file isn't known"):
        mh.Dataset.read(str(tmp_path / "a.xyz"))
    assert mh.Dataset.read(str(tmp_path / "a.xyz"), format="text").take(1) == ["x"]
    (tmp_path / "empty.txt").write_text("")
    assert mh.Dataset.read(str(tmp_path / "empty.txt")).count(workers=0) == 0


def test_rows_of_csv_with_a_wrong_number_of_fields_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n3\n4,x\n5,6\n")
    made = mh.Dataset.read(str(path), types={"b": "int64"})
    assert refused(made, "the row has 1 fields where 2 are expected", tmp_path).where == f"{path}, line 3"
    written = made.write(str(tmp_path / "out"), workers=0, max_bad_records=2)
    assert written.records == 2
    assert [bad["where"] for bad in set_aside(tmp_path)] == [f"{path}, line 3", f"{path}, line 4"]


def test_an_error_in_a_batch_function_ends_the_job_and_reports_the_position(tmp_path: Path) -> None:
    def check(table: pa.Table) -> pa.Table:
        raise ValueError("no good")

    made = mh.Dataset.from_records([1, 2, 3]).map_batches(check)
    error = refused(
        made, "map_batches check or a step after it raised ValueError: no good", tmp_path, max_bad_records=9
    )
    assert error.where is not None
    assert "from given records, partition 0, record 1 to" in error.where
    refused(mh.Dataset.from_records([1]).map_batches(lambda table: 3), "something that isn't a batch", tmp_path)


def test_a_function_that_cannot_be_sent_is_refused_before_anything_starts(tmp_path: Path) -> None:
    lock = threading.Lock()
    made = mh.Dataset.from_records([1]).map(lambda x: lock.locked())
    refused(made, "a function of the job can't be sent to the workers: TypeError: cannot pickle", tmp_path)


def test_a_damaged_file_between_two_stages_is_named_and_written_again(tmp_path: Path) -> None:
    made = mh.Dataset.from_records(list(range(1000)), partition_bytes=2**12).sort_by()
    plan = make_plan(made._node, Output("jsonl", None))
    with pytest.raises(mh.ManyhandsError):  # a job that ends in its last stage
        made.map(lambda x: 1 // 0).write(str(tmp_path / "out"), workers=0)
    job = JobFolder(str(tmp_path / "out" / ".manyhands"))
    path = Path(runs_path(job.stage(plan.stages[0]), 0))
    job.close(delete=False)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(mh.DataError, match=r"the checksum of the block at byte .* does not match") as caught:
        list(read_blocks(str(path), read_index(str(path))[0], ()))
    assert caught.value.where == str(path)
    path.write_bytes(data[:100])
    with pytest.raises(mh.DataError, match="it has no index"):
        read_index(str(path))
    assert made.write(str(tmp_path / "out"), workers=0).records == 1000


def test_a_full_disk_is_reported_and_the_job_resumes(tmp_path: Path) -> None:
    import resource

    made = mh.Dataset.from_records([1] * 50).flat_map(lambda x: ["some text"] * 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refused(made, "a task could not read or write: .*File too large", tmp_path, format="text")
        assert not list((tmp_path / "out").rglob("*.tmp"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert made.write(str(tmp_path / "out"), format="text", workers=0).records == 50_000


def test_wrong_options_are_refused() -> None:
    made = mh.Dataset.from_records([1])
    with pytest.raises(mh.ConfigError, match="there is no option 'worker'") as caught:
        made.count(worker=2)  # type: ignore[call-arg]
    assert caught.value.hint == "did you mean 'workers'?"
    for wrong in ({"workers": -1}, {"max_bad_records": 1.5}):
        with pytest.raises(mh.ConfigError, match="is out of range"):
            made.count(**wrong)  # type: ignore[arg-type]
    with pytest.raises(mh.ConfigError, match="memory is too small for one worker"):
        made.count(memory="10MiB")
    with pytest.raises(mh.ConfigError, match="an amount of memory can't be parsed"):
        made.count(memory="much")
    with pytest.raises(mh.ConfigError, match="unknown output format"):
        made.write("out", format="xml")
    with pytest.raises(mh.ConfigError, match="unknown input format"):
        mh.Dataset.read(__file__, format="xml")
    with pytest.raises(mh.ConfigError, match="unknown join"):
        made.join(made, on="x", how="cross")
    with pytest.raises(mh.ConfigError, match="unknown form of batches"):
        made.map_batches(len, form="pandas")
    with pytest.raises(mh.ConfigError, match="fraction is not between 0 and 1"):
        made.sample(2)
    with pytest.raises(mh.ConfigError, match="aggregate needs at least one aggregate"):
        made.group_by("n").aggregate(n=mh.Aggregate.count())
    with pytest.raises(mh.ConfigError, match="is not an Aggregate"):
        made.group_by().aggregate(n=len)  # type: ignore[arg-type]


def test_functions_are_identified_by_their_code() -> None:
    program = "from manyhands.prepare.plan.fingerprint import fingerprint_code as f; "
    program += "k = {}; s = {{'a', 'b', 'c'}}\n{}\nprint(f(g))"

    def of(definition: str, value: int = 1) -> str:
        command = [sys.executable, "-c", program.format(value, definition)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = of("g = lambda x: x['a'] in s and k")
    assert first == of("\n\ng = lambda x: x['a'] in s and k")  # in another process, and in another line
    others = [
        of("g = lambda x: x['b'] in s and k"),
        of("g = lambda x: x['a'] in s or k"),
        of("g = lambda x: x['a'] in s and k", 2),
    ]
    assert len({first, *others}) == 4
    bound = 3
    assert fingerprint_code(lambda x: x + bound) != fingerprint_code(lambda x: x + first)


def test_bad_records_of_a_cache_count_in_every_job_that_reads_it(tmp_path: Path) -> None:
    cached = mh.Dataset.from_records([1, 0, 2]).map(lambda x: 1 / x).cache(str(tmp_path / "cache"))
    made = cached.join(cached, on=lambda x: x)
    written = made.write(str(tmp_path / "out"), workers=0, max_bad_records=1)
    assert (written.records, written.bad_records) == (2, 1)
    assert "ZeroDivisionError" in set_aside(tmp_path)[0]["what"]
    with pytest.raises(mh.DataError, match="ZeroDivisionError"):
        cached.count(workers=0)
    with pytest.raises(mh.DataError, match="2 bad records are more than max_bad_records allows"):
        cached.map(lambda x: 1 / (x - 1)).count(workers=0, max_bad_records=1)
    assert cached.cache(str(tmp_path / "again")).take(9, workers=0, max_bad_records=1) == [1.0, 0.5]
