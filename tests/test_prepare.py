"""Preparing data: what comes out is right (DuckDB says what is), whatever the partitions and the memory."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import manyhands as mh
from manyhands.prepare.engines.engine import InProcess
from manyhands.prepare.records.table_order import order_and_starts, order_of

TIGHT = InProcess(0)  # ranges are worked on a few blocks at a time
ALIKE = [b"a" * 8, b"a" * 8 + b"\0", b""]  # in their first 8 bytes
TINY = 512  # bytes a partition: a few records

keys = st.one_of(st.integers(-3, 3), st.integers(-(2**62), 2**62))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
rows = st.lists(st.fixed_dictionaries({"k": keys, "t": texts, "v": st.integers(-(10**6), 10**6)}), max_size=60)
cases = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dataset(records: list[Any], *, as_table: bool) -> mh.Dataset:
    made = mh.Dataset.from_records(records, partition_bytes=TINY)
    return made.map_batches(lambda table: table) if as_table else made


def all_of(made: mh.Dataset) -> list[Any]:
    return made.take(10**9, engine=TIGHT, progress=False)


def table_of(records: list[dict[str, Any]]) -> pa.Table:
    return pa.table(
        {
            name: pa.array([r[name] for r in records], kind)
            for name, kind in (("k", "int64"), ("t", "string"), ("v", "int64"))
        }
    )


def ask(sql: str, *tables: pa.Table) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        for name, table in zip("ab", tables, strict=False):
            connection.register(name, table)
        return connection.execute(sql).fetchall()


@cases
@given(rows, st.booleans(), st.sampled_from([("k",), ("t",), ("k", "t")]))
def test_grouping_gives_the_same_as_duckdb(records: list[dict[str, Any]], as_table: bool, by: tuple[str, ...]) -> None:
    ways = mh.Aggregate
    groups = dataset(records, as_table=as_table).group_by(by)
    made = groups.aggregate(
        n=ways.count(),
        total=ways.sum(of="v"),
        least=ways.minimum(of="v"),
        most=ways.maximum(of="v"),
        mean=ways.mean(of="v"),
    )
    names = ", ".join(by)
    asked = ask(
        f"select {names}, count(*), sum(v), min(v), max(v), avg(v) from a group by {names} order by {names}",
        table_of(records),
    )
    assert [tuple(row.values()) for row in all_of(made)] == asked


@cases
@given(rows, st.booleans(), st.booleans(), st.sampled_from(["k", "t", ["t", "k"]]))
def test_sorting_gives_the_same_as_duckdb_and_is_stable(
    records: list[dict[str, Any]], as_table: bool, descending: bool, by: Any
) -> None:
    numbered = [{**record, "v": number} for number, record in enumerate(records)]
    order = "desc" if descending else "asc"
    names = ", ".join(f"{name} {order}" for name in ([by] if isinstance(by, str) else by))
    made = all_of(dataset(numbered, as_table=as_table).sort_by(by, descending=descending))
    assert [(row["k"], row["t"], row["v"]) for row in made] == ask(
        f"select k, t, v from a order by {names}, v", table_of(numbered)
    )


@cases
@given(rows, rows, st.booleans(), st.sampled_from(["inner", "left", "right", "outer"]))
def test_joining_gives_the_same_as_duckdb(
    left: list[dict[str, Any]], right: list[dict[str, Any]], as_table: bool, how: str
) -> None:
    made = dataset(left, as_table=as_table).join(dataset(right, as_table=False), on="k", how=how)
    none = {"k": None, "v": None}
    pairs = [tuple(side[name] for side in (a or none, b or none) for name in ("k", "v")) for a, b in all_of(made)]
    sql = f"select a.k, a.v, b.k, b.v from a {'full' if how == 'outer' else how} join b on a.k = b.k"
    assert Counter(pairs) == Counter(ask(sql, table_of(left), table_of(right)))
    ordered = [pair[0] if pair[0] is not None else pair[2] for pair in pairs]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("how", ["inner", "left", "right", "outer"])
@pytest.mark.parametrize(("lefts", "rights"), [(30, 40), (30, 0), (0, 40)])
def test_a_very_frequent_key_is_joined_in_order(how: str, lefts: int, rights: int) -> None:
    sides = [
        [{"k": 0, "v": 0}, *({"k": 7, "v": value} for value in range(count)), {"k": 9, "v": 0}]
        for count in (lefts, rights)
    ]
    left, right = (dataset(side, as_table=False) for side in sides)
    made = left.join(right, on="k", how=how)
    pairs = all_of(made)
    assert pairs == made.take(10**9, workers=0, progress=False)  # ample memory
    hot = [(a and a["v"], b and b["v"]) for a, b in pairs if (a or b)["k"] == 7]
    alone = {"left": lefts, "right": rights, "outer": lefts + rights, "inner": 0}[how]
    assert len(hot) == (lefts * rights or alone)
    if lefts and rights:
        assert hot == [(one, other) for one in range(lefts) for other in range(rights)]


@cases
@given(rows, st.booleans())
def test_distinct_gives_the_same_as_duckdb(records: list[dict[str, Any]], as_table: bool) -> None:
    twice = records + records[::2]
    made = [(row["k"], row["t"], row["v"]) for row in all_of(dataset(twice, as_table=as_table).distinct())]
    assert len(made) == len(set(made))
    assert set(made) == set(ask("select distinct k, t, v from a", table_of(twice)))
    firsts = all_of(dataset(twice, as_table=as_table).distinct(key="k"))
    assert firsts == [{**record} for _, record in sorted({r["k"]: r for r in reversed(twice)}.items())]


@cases
@given(st.lists(st.one_of(st.integers(), st.text(max_size=9)), max_size=80), st.integers(0, 3))
def test_a_shuffle_loses_no_record_and_depends_on_its_seed_alone(records: list[Any], seed: int) -> None:
    made = dataset(records, as_table=False)
    shuffled = all_of(made.shuffle(seed))
    assert Counter(map(repr, shuffled)) == Counter(map(repr, records))
    assert shuffled == made.shuffle(seed).take(10**9, workers=0, progress=False)  # ample memory
    assert all_of(made.repartition()) == records


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_batches_with_different_columns_are_shuffled_without_loss_in_any_memory(tmp_path: Path, form: str) -> None:
    records = [{"n": n, "a": None if n < 40 else n, "t": f"text {n}"} for n in range(100)]  # null, then int64
    made = dataset(records, as_table=True).filter(lambda row: row["n"] != 50)
    made = made.map_batches(lambda table: table if table["n"][0].as_py() % 3 else table.to_pylist())
    for name, arranged in (("shuffle", made.shuffle(1)), ("sort", made.sort_by("n", descending=True))):
        tight = arranged.write(str(tmp_path / f"{name}-tight"), format=form, engine=TIGHT, progress=False)
        ample = arranged.write(str(tmp_path / f"{name}-ample"), format=form, workers=0, progress=False)
        assert tight.digest == ample.digest
        found = [row for path in tight.files for row in all_of(mh.Dataset.read(f"{tight.path}/{path}"))]
        assert sorted(found, key=lambda row: row["n"]) == [record for record in records if record["n"] != 50]


def test_another_seed_gives_another_order_and_samples_have_the_requested_size() -> None:
    made = mh.Dataset.from_records(range(20_000), partition_bytes=2**14)
    first, other = (made.shuffle(seed).take(10**9, workers=0, progress=False) for seed in (1, 2))
    assert first != other
    assert sorted(first) == sorted(other) == list(range(20_000))
    assert sum(value < 10_000 for value in first[:10_000]) == pytest.approx(5000, abs=250)
    for as_table in (False, True):
        source = made.map_batches(lambda table: table) if as_table else made
        assert source.sample(0.1, seed=3).count(workers=0, progress=False) == pytest.approx(2000, abs=200)
    assert made.sample(0.0).count(workers=0) == 0
    assert made.sample(1.0).count(workers=0) == 20_000


LIKE_ANOTHER = st.builds(
    lambda length, end: (b"a" * 100)[:length] + end,
    st.integers(0, 80),
    st.one_of(st.just(b""), st.just(b"\0"), st.binary(max_size=12), st.integers(1, 20).map(bytes)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=3), LIKE_ANOTHER), max_size=60))
def test_rows_are_sorted_by_all_parts_of_their_keys(values: list[bytes]) -> None:
    for kind in (pa.binary(), pa.large_binary()):
        table = pa.table({"k": pa.array([b"", *values], kind)}).slice(
            1
        )  # a column that begins in the middle of its buffers
        for descending in (False, True):
            expected = sorted(range(len(values)), key=values.__getitem__, reverse=descending)
            assert order_of(table, ("k",), descending=descending).to_pylist() == expected
        found = order_and_starts(table.column("k")) if values else None
        if found is not None:
            in_order = sorted(values)
            starts = [place for place, value in enumerate(in_order) if not place or value != in_order[place - 1]]
            order = sorted(range(len(values)), key=values.__getitem__)
            assert (found[0].tolist(), found[1].tolist()) == (order, starts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**63 - 1)), max_size=300), st.booleans())
def test_numbers_are_sorted_by_value_and_keep_their_type(values: list[int], signed: bool) -> None:
    numbers = [value - 2**62 if signed else value + 2**62 for value in values]
    middle = len(numbers) // 2
    for these in (numbers, sorted(numbers), sorted(numbers[:middle]) + sorted(numbers[middle:])):
        table = pa.table({"k": pa.array(these, pa.int64() if signed else pa.uint64())})
        for descending in (False, True):
            expected = sorted(range(len(these)), key=these.__getitem__, reverse=descending)
            assert order_of(table, ("k",), descending=descending).to_pylist() == expected


MANY_KEYS: dict[str, Callable[[int], Any]] = {
    "texts": lambda index: f"word {index % 6000}",
    "numbers": lambda index: index % 6000 - 3000,
    "bytes": lambda index: b"%d" % (index % 6000),
    "beyond 64 bits": lambda index: 2**64 + index % 6000,
    "truth and numbers": lambda index: index % 2 == 1 if index % 3 else index % 6000,
    "half of a character": lambda index: f"\ud800{index % 6000}",
    "pairs": lambda index: (index % 60, str(index % 100)),
}


@pytest.mark.parametrize("kind", MANY_KEYS)
def test_many_keys_are_counted_as_python_counts_them(kind: str) -> None:
    keys = [MANY_KEYS[kind](index) for index in range(20_000)]
    grouped = mh.Dataset.from_records(keys).group_by().aggregate(n=mh.Aggregate.count(), m=mh.Aggregate.count())
    found = [tuple(record.values()) for record in all_of(grouped)]
    assert found == [(key, count, count) for key, count in sorted(Counter(keys).items())]
    assert [type(key) for key, _, _ in found] == [type(key) for key in sorted(Counter(keys))]


def test_a_key_with_most_of_the_records_is_sorted_within_little_memory() -> None:
    records = [{"k": 7 if number % 10 else number, "n": number} for number in range(600)]
    for as_table in (False, True):
        made = all_of(dataset(records, as_table=as_table).sort_by("k"))
        assert made == sorted(records, key=lambda record: record["k"])


def test_each_operation_has_its_documented_result() -> None:
    made = mh.Dataset.from_records([1, 2, 3, 4], partition_bytes=16)
    assert all_of(made.map(lambda x: x * x).filter(lambda x: x % 2)) == [1, 9]
    assert all_of(made.flat_map(range)) == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert all_of(made.key_by(lambda x: x % 2)) == [(1, 1), (0, 2), (1, 3), (0, 4)]
    assert all_of(made.map_batches(lambda batch: {"x": batch["value"] * 2}, form="numpy")) == [
        {"x": x} for x in (2, 4, 6, 8)
    ]
    own = mh.Aggregate(start=lambda x: [x], add=lambda xs, x: [*xs, x], merge=lambda xs, ys: xs + ys, finish=tuple)
    assert all_of(made.group_by(lambda x: x % 2).aggregate(all=own)) == [
        {"key": 0, "all": (2, 4)},
        {"key": 1, "all": (1, 3)},
    ]
    assert made.take(2, workers=0) == [1, 2]
    assert made.take(0, workers=0) == []
    assert mh.Dataset.from_records([]).group_by().aggregate(n=mh.Aggregate.count()).count(workers=0) == 0


def test_all_formats_can_be_read_back_unchanged(tmp_path: Path) -> None:
    records = [{"n": number, "text": f"ü {number}", "nothing": None} for number in range(100)]
    source = mh.Dataset.from_records(records, partition_bytes=2**10)
    for form in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        written = source.write(str(tmp_path / form), format=form, workers=0, progress=False)
        assert written.records == 100
        assert len(written.files) > 1
        assert all_of(mh.Dataset.read(written.path)) == records
    lines = source.map(lambda record: record["text"])
    for form in ("text", "text.gz", "text.zst"):
        written = lines.write(str(tmp_path / form), format=form, workers=0, progress=False)
        assert all_of(mh.Dataset.read(written.path)) == [record["text"] for record in records]


def test_csv_columns_are_text_unless_types_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('zip,age,says\n007,3,"two\nlines"\n010,,x\n')
    assert all_of(mh.Dataset.read(str(tmp_path / "a.csv"))) == [
        {"zip": "007", "age": "3", "says": "two\nlines"},
        {"zip": "010", "age": "", "says": "x"},
    ]
    typed = all_of(mh.Dataset.read(str(tmp_path / "a.csv"), types={"age": "int64"}))
    assert [row["age"] for row in typed] == [3, None]


def test_parquet_is_read_by_row_groups_and_columns(tmp_path: Path) -> None:
    table = pa.table({"n": range(1000), "t": [f"text {n}" for n in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    made = mh.Dataset.read(str(tmp_path), columns=["n"], partition_bytes=2**12)
    assert "partitions" in made.explain()
    assert all_of(made) == [{"n": n} for n in range(1000)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12), max_size=30),
    st.integers(1, 60),
    st.booleans(),
)
def test_every_line_is_read_once_wherever_files_are_split(
    tmp_path: Path, lines: list[str], size: int, ends: bool
) -> None:
    text = "\n".join(lines) + ("\n" if ends and lines else "")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    expected = text.removeprefix("\ufeff").split("\n")
    if expected[-1] == "":
        expected.pop()
    assert all_of(mh.Dataset.read(str(tmp_path / "a.txt"), partition_bytes=size)) == expected


def test_addresses_of_fsspec_can_be_read_and_written() -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/in/a.jsonl", b'{"x": 1}\n{"x": 2}\n')
    system.pipe("/in/b.jsonl.gz", gzip.compress(b'{"x": 3}\n'))
    made = mh.Dataset.read("memory://in/*").group_by(lambda row: row["x"] % 2).aggregate(n=mh.Aggregate.count())
    written = made.write("memory://out", workers=0, progress=False)
    assert all_of(mh.Dataset.read("memory://out")) == [{"key": 0, "n": 1}, {"key": 1, "n": 2}]
    assert made.write("memory://out", workers=0, progress=False).digest == written.digest
    assert not [path for path in system.find("/out") if ".manyhands" in path]


def test_a_cache_is_computed_once(tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def note(x: int) -> int:
        with seen.open("a") as file:
            file.write("x")
        return x

    made = mh.Dataset.from_records([1, 2, 3], partition_bytes=16).map(note).cache()
    assert all_of(made) == [1, 2, 3]
    assert all_of(made.map(lambda x: -x)) == [-1, -2, -3]
    assert made.count(workers=0) == 3
    assert len(seen.read_text()) == 3


def test_existing_output_is_not_computed_again_and_another_job_is_refused(tmp_path: Path) -> None:
    made = mh.Dataset.from_records([3, 1, 2], partition_bytes=16)
    first = made.sort_by().write(str(tmp_path / "out"), workers=0)
    again = made.sort_by().write(str(tmp_path / "out"), workers=0)
    assert (first.digest, bool(first.stages)) == (again.digest, True)
    assert not again.stages
    with pytest.raises(mh.ConfigError, match="holds the output of another job"):
        made.write(str(tmp_path / "out"), workers=0)
    assert made.write(str(tmp_path / "out"), workers=0, overwrite=True).digest != first.digest
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["records"] == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(mh.ConfigError, match="something that is not an output"):
        made.write(str(tmp_path / "mine"), workers=0, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_deleted_files_are_written_again(tmp_path: Path) -> None:
    made = mh.Dataset.from_records([3, 1, 2], partition_bytes=16)
    first = made.write(str(tmp_path / "out"), workers=0)
    (tmp_path / "out" / first.files[0]).unlink()
    assert made.write(str(tmp_path / "out"), workers=0).digest == first.digest
    assert (tmp_path / "out" / first.files[0]).exists()


def test_a_terminal_shows_a_bar_for_each_stage(tmp_path: Path) -> None:
    program = "import manyhands as mh; print(mh.Dataset.from_records([2, 1]).sort_by().write('out', workers=1))"
    shown = tmp_path / "shown"
    with shown.open("wb") as file:
        code = pty_spawn([sys.executable, "-c", program], tmp_path, file)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.read_text())
    assert code == 0
    assert re.search(r"stage 1/2  given records → sort by the record  1/1 tasks  .* records/s", text)
    assert re.search(r"stage 2/2  stage 0 → write jsonl  1/1 tasks", text)
    assert "2 records in 1 file" in text


def pty_spawn(command: list[str], folder: Path, file: IO[bytes]) -> int:
    """Run a command on a terminal of its own, and copy what it shows; its exit code."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with suppress(OSError):  # the terminal's end
        while data := os.read(ours, 4096):
            file.write(data)
    os.close(ours)
    return process.wait()


def test_the_plan_is_split_at_shuffles_and_knows_its_partitions(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x y\n" * 100)
    made = mh.Dataset.read(f"{tmp_path}/*.txt", partition_bytes=200)
    words = made.flat_map(str.split).group_by().aggregate(n=mh.Aggregate.count())
    assert words.sort_by("n").explain().splitlines() == [
        "stage 0  read 2 text files → flat_map split → group by the record: n",
        "         4 partitions, 800 B",
        "stage 1  stage 0 → sort by n",
        "         number of partitions depends on the data, about 400 B each",
        "stage 2  stage 1 → write jsonl",
        "         number of partitions depends on the data, about 400 B each",
    ]
    twice = words.join(words, on="key").explain()
    assert twice.count("read 2 text files") == 1  # both sides are the same stage
