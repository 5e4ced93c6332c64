"""Preparing data: random tables of all types, through files and shuffles, equal what DuckDB or plain Python computes.

DuckDB decides which rows are bad, their order, groups and pairs, the counts, the sums of integers, and the extremes.
Where its results differ on purpose, plain Python does:

- Sums of floats and decimals, and means: DuckDB rounds at each addition, Manyhands once. The oracle adds fractions.
- Times and wide decimals: DuckDB has no nanoseconds for most types. It gets numbers or text in the same order.
- Of equal values (0.0 and -0.0), Manyhands shows the first in the order of the records, DuckDB any.

Each job runs with little and with ample memory, and must write the same bytes. Values are compared as text that shows
all bits. The quick tests draw a few tables of each family of types, the slow ones many.
"""

from __future__ import annotations

import decimal
import itertools
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import manyhands as mh
from manyhands.prepare.engines.engine import InProcess, JobEngine
from manyhands.prepare.engines.local import close_persistent_pools, persistent_pool
from support.random_tables import FAMILIES, Kind, Table, flat, pairs_of_tables, plain_rows, tables

TIGHT, AMPLE = InProcess(0), InProcess(2**33)  # ranges are worked on a few blocks at a time, or at once
PARTITION_BYTES = (2**10, 2**14)  # many partitions with blocks of one record; few partitions with blocks of several
MANY_BAD = 10**6

Check = Callable[[Any, "Jobs"], None]


class Jobs:
    """Writes the input and the output of jobs into new folders, and runs each job with several engines."""

    def __init__(self, folder: Path, engines: Sequence[JobEngine]) -> None:
        self._folder, self._engines = folder, engines
        self._numbers = itertools.count()
        self.last = ""  # the folder of the last output

    def new(self, name: str) -> str:
        """A new path."""
        return f"{self._folder}/{next(self._numbers)}-{name}"

    def read(self, table: pa.Table) -> mh.Dataset:
        """The records of a table, divided among three files of a few row groups."""
        folder = Path(self.new("in"))
        folder.mkdir()
        third = -(-len(table) // 3)
        for number in range(3):
            pq.write_table(table.slice(number * third, third), folder / f"{number}.parquet", row_group_size=25)
        return mh.Dataset.read(str(folder), partition_bytes=PARTITION_BYTES[len(table) % 2])

    def written(self, made: mh.Dataset, form: str, **options: Any) -> tuple[list[Path], Any]:
        """The files and the summary of a job. All engines write the same bytes and count the same records."""
        found = []
        for engine in self._engines:
            folder = self.last = self.new("out")
            summary = made.write(
                folder, format=form, engine=engine, progress=False, max_bad_records=MANY_BAD, **options
            )
            found.append((summary.digest, summary.bad_records, [stage.records for stage in summary.stages]))
        assert found == found[:1] * len(found)
        return [Path(folder, name) for name in summary.files], summary

    def lines(self, made: mh.Dataset) -> tuple[list[Any], Any]:
        """The records as `flat` shows them, and the summary."""
        files, summary = self.written(made.map(lambda record: json.dumps(flat(record))), "text")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()], summary

    def table(self, made: mh.Dataset, **options: Any) -> tuple[pa.Table | None, Any]:
        """The records of Parquet files, which have one schema, and the summary."""
        files, summary = self.written(made, "parquet", **options)
        found = [pq.read_table(file) for file in files]
        assert all(each.schema == found[0].schema for each in found)
        return (pa.concat_tables(found) if found else None), summary


def hold(check: Check, cases: st.SearchStrategy[Any], examples: int, folder: Path, *engines: JobEngine) -> None:
    """Call `check` for this many cases. The cases are the same in every run."""
    numbers = itertools.count()
    many = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @many
    @given(cases)
    def holds(case: Any) -> None:
        below = folder / str(next(numbers))
        below.mkdir()
        check(case, Jobs(below, engines or (TIGHT, AMPLE)))

    holds()


def ask(sql: str, **given_tables: pa.Table) -> list[tuple[Any, ...]]:
    """The rows of DuckDB's answer."""
    with duckdb.connect(config={"threads": 1}) as connection:
        for name, table in given_tables.items():
            connection.register(name, table)
        return connection.execute(sql).fetchall()


def good(table: Table, keys: Sequence[str]) -> str:
    """The condition in SQL that a row's keys are neither null nor NaN."""
    conditions = [f"{key} is not null" for key in keys]
    conditions += [f"not isnan({key})" for key in keys if table.columns[key].kind.family == "floats"]
    return " and ".join(conditions)


def check_files(table: Table, jobs: Jobs) -> None:
    """Values and types stay the same in files, and on the way through Python's objects."""
    path = jobs.new("whole.parquet")
    pq.write_table(table.arrow(), path)
    source = pq.read_table(path)
    made = jobs.read(source)
    found, summary = jobs.table(made)
    assert (summary.records, summary.bad_records) == (table.rows, 0)
    assert plain_rows(source) == ([] if found is None else plain_rows(found))
    assert found is None or found.schema.types == source.schema.types
    shown = [row for row in range(table.rows) if table.are_shown(row)]
    lines, summary = jobs.lines(made.map(lambda row: row))
    assert lines == [table.shown(row) for row in shown]
    assert (summary.records, summary.bad_records) == (len(shown), table.rows - len(shown))
    if not any(pa.types.is_dictionary(kind) for kind in source.schema.types):
        found, summary = jobs.table(made.map(lambda row: row), schema=source.schema)
        assert plain_rows(source.take(pa.array(shown, pa.int64()))) == ([] if found is None else plain_rows(found))
        assert found is None or found.schema.types == source.schema.types


def check_sort(case: tuple[Table, bool, bool], jobs: Jobs) -> None:
    """Rows keep all values of Arrow, and rows of equal keys their order."""
    table, descending, by_two = case
    keys = ["k", "other"] if by_two else ["k"]
    path = jobs.new("whole.parquet")
    pq.write_table(table.arrow(), path)
    source = pq.read_table(path)
    order = ", ".join(f"{key} {'desc' if descending else 'asc'}" for key in keys)
    rows = table.for_duckdb(keys, lambda row: True)
    expected = [i for (i,) in ask(f"select i from rows where {good(table, keys)} order by {order}, i", rows=rows)]
    found, summary = jobs.table(jobs.read(source).sort_by(keys if by_two else "k", descending=descending))
    assert ([] if found is None else found.column("i").to_pylist()) == expected
    assert plain_rows(source.take(pa.array(expected, pa.int64()))) == ([] if found is None else plain_rows(found))
    assert [stage.records for stage in summary.stages][:1] == [len(expected)]
    assert (summary.records, summary.bad_records) == (len(expected), table.rows - len(expected))


def check_groups(case: tuple[Table, bool], jobs: Jobs) -> None:
    """Counts, sums, means and extremes. A row is bad if its key or its value can't be used."""
    table, by_two = case
    keys = ["k", "other"] if by_two else ["k"]
    values = table.columns["v"]

    def is_good(row: int) -> bool:
        is_shown = all(table.columns[key].is_shown(row) for key in keys)
        return table.are_keys(keys, row) and is_shown and values.values[row] is not None

    is_whole = values.kind.family == "ints"
    expected = ask(
        f"select list(i order by i), count(*), {'sum(v)' if is_whole else '0'}, min(v), max(v) from rows "
        f"group by {', '.join(keys)} order by {', '.join(keys)}",
        rows=table.for_duckdb([*keys, "v"], is_good),
    )
    ways = {
        "n": mh.Aggregate.count(),
        "total": mh.Aggregate.sum("v"),
        "mean": mh.Aggregate.mean("v"),
        "least": mh.Aggregate.minimum("v"),
        "most": mh.Aggregate.maximum("v"),
        "first": mh.Aggregate.first("i"),
    }
    made = jobs.read(table.arrow()).group_by(keys if by_two else "k")
    lines, summary = jobs.lines(made.aggregate(**ways))
    assert len(lines) == len(expected)
    for line, (rows, count, total, least, most) in zip(lines, expected, strict=True):
        of_group = [values.values[row] for row in rows]
        assert [line[key] for key in keys] == [table.columns[key].shown(rows[0]) for key in keys]
        assert (line["n"], line["first"]) == (repr(count), repr(rows[0]))
        assert [line["total"], line["mean"]] == [flat(value) for value in total_and_mean(of_group)]
        assert not is_whole or line["total"] == repr(total)
        assert line["least"] == flat(next(value for value in of_group if is_same(value, least, values.kind)))
        assert line["most"] == flat(next(value for value in of_group if is_same(value, most, values.kind)))
    bad = table.rows - sum(len(rows) for rows, *_ in expected)
    assert (summary.records, summary.bad_records) == (len(expected), bad)
    if is_whole:  # sums and counts alone are merged in tables
        lines_of_few, summary = jobs.lines(made.aggregate(n=ways["n"], total=ways["total"]))
        assert lines_of_few == [{name: line[name] for name in (*keys, "n", "total")} for line in lines]
        assert summary.bad_records == bad


def is_same(value: Any, of_duckdb: Any, kind: Kind) -> bool:
    """True if two values are equal, or both NaN."""
    if isinstance(value, float):
        return value == of_duckdb or (math.isnan(value) and math.isnan(of_duckdb))
    return bool(kind.in_duckdb(value) == of_duckdb)


def total_and_mean(values: list[Any]) -> tuple[Any, Any]:
    """Sum and mean by fractions, rounded once."""
    count = len(values)
    if isinstance(values[0], int):
        return sum(values), sum(values) / count
    total = sum(map(Fraction, values)) if all(map(math.isfinite, values)) else None
    if isinstance(values[0], float):
        if total is None:
            special = sum(value for value in values if not math.isfinite(value))
            return special, special
        if not total and not any(values) and all(math.copysign(1, value) < 0 for value in values):
            return -0.0, -0.0
        return rounded(total), rounded(total / count)
    with decimal.localcontext(decimal.Context(prec=200)):
        exact = sum(values)
    digits = max(28, len(exact.as_tuple().digits))
    return exact, decimal.Context(prec=digits).divide(exact, count)


def rounded(value: Fraction) -> float:
    """The nearest float."""
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_distinct(table: Table, jobs: Jobs) -> None:
    """The first row of each key. A row is bad if Python has no form for one of its values."""

    def is_good(row: int) -> bool:
        return table.are_keys(["k"], row) and table.are_shown(row)

    rows = table.for_duckdb(["k"], is_good)
    expected = [i for (i,) in ask("select min(i) from rows group by k order by k", rows=rows)]
    lines, summary = jobs.lines(jobs.read(table.arrow()).distinct("k"))
    assert lines == [table.shown(row) for row in expected]
    assert (summary.records, summary.bad_records) == (len(expected), table.rows - len(rows))


JOINS = {"inner": "join", "left": "left join", "right": "right join", "outer": "full join"}


def check_joins(case: tuple[tuple[Table, Table], str], jobs: Jobs) -> None:
    """Pairs of a table with itself, and with one whose keys have another type, in the order of keys and rows."""
    (table, other), how = case
    for right, kind in ((table, "inner"), (other, how)):
        good_rows = [
            each.for_duckdb(["k"], lambda row, each=each: each.are_keys(["k"], row) and each.are_shown(row))
            for each in (table, right)
        ]
        expected = ask(
            f"select a.i, b.i from a {JOINS[kind]} b on a.k = b.k order by coalesce(a.k, b.k), a.i, b.i",
            a=good_rows[0],
            b=good_rows[1],
        )
        lines, summary = jobs.lines(jobs.read(table.arrow()).join(jobs.read(right.arrow()), on="k", how=kind))
        assert lines == [
            [flat(None) if i is None else side.shown(i) for i, side in zip(pair, (table, right), strict=True)]
            for pair in expected
        ]
        bad = table.rows + right.rows - sum(map(len, good_rows))
        assert (summary.records, summary.bad_records) == (len(expected), bad)
        assert [stage.records for stage in summary.stages][:2] == list(map(len, good_rows))


PARTS: dict[str, list[st.SearchStrategy[Any]]] = {
    "numbers": [st.none(), st.integers(-(2**53), 2**53), st.sampled_from([0.5, -0.0, math.inf, 1e300])],
    "texts": [st.none(), st.text(max_size=5), st.just("long" * 30)],
    "lists": [st.none(), st.lists(st.integers(0, 9)), st.lists(st.none() | st.just(0.5)), st.just([])],
    "dicts": [
        st.none(),
        st.fixed_dictionaries({"a": st.integers(0, 9)}),
        st.fixed_dictionaries({"a": st.just(0.5), "b": st.text(max_size=3)}),
        st.fixed_dictionaries({"c": st.lists(st.integers(0, 9), max_size=2)}),
    ],
}
"""For each column, kinds of values that have a common type. A run of records has one of them."""


@st.composite
def records_in_runs(draw: Any) -> list[dict[str, Any]]:
    """Records whose columns change their kind every few records, so that files see different kinds."""
    made: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(2, 4))):
        kinds = {name: draw(st.sampled_from(some)) for name, some in PARTS.items()}
        pools = {name: draw(st.lists(kind, min_size=1, max_size=3)) for name, kind in kinds.items()}
        for row in range(draw(st.integers(1, 12))):
            made.append({name: pool[row % len(pool)] for name, pool in pools.items()})
    return made


def check_parts(records: list[dict[str, Any]], jobs: Jobs) -> None:
    """All Parquet files of an output have one schema, and their values equal those of the records."""
    found, summary = jobs.table(mh.Dataset.from_records(records, partition_bytes=500))
    assert (summary.records, summary.bad_records) == (len(records), 0)
    assert found is not None
    fields = (
        {field.name for field in found.schema.field("dicts").type}
        if pa.types.is_struct(found.schema.field("dicts").type)
        else set()
    )
    expected = [
        {**row, "dicts": None if row["dicts"] is None else {**dict.fromkeys(fields), **row["dicts"]}} for row in records
    ]
    assert found.to_pylist() == expected  # 1 equals 1.0: a column of both holds floats
    read = mh.Dataset.read(str(Path(jobs.last))).map(lambda row: row)
    assert read.take(10**6, engine=TIGHT, progress=False) == expected


class Processes:
    """Runs at most this many tasks at a time in a pool of processes, and the last submitted one first."""

    def __init__(self, pool: JobEngine, workers: int, memory_bytes: int) -> None:
        self._pool, self.workers, self.memory_bytes = pool, workers, memory_bytes
        self._waiting: deque[tuple[Any, Future[Any]]] = deque()
        self._running = 0
        self._lock = threading.Lock()

    def submit(self, task: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._waiting.append((task, future))
        self._start()
        return future

    def _start(self) -> None:
        with self._lock:
            if not self._waiting or self._running == self.workers:
                return
            self._running += 1
            task, future = self._waiting.pop()
        self._pool.submit(task).add_done_callback(lambda done: self._end(done, future))

    def _end(self, done: Future[Any], future: Future[Any]) -> None:
        with self._lock:
            self._running -= 1
        if done.exception() is None:
            future.set_result(done.result())
        else:
            future.set_exception(done.exception())
        self._start()


@pytest.fixture
def processes() -> Iterator[list[JobEngine]]:
    """One, two and three workers, with little and with ample memory, and this process."""
    pool = persistent_pool(3, 2**30)
    yield [TIGHT, *(Processes(pool, workers, memory) for workers, memory in ((1, 0), (2, 2**33), (3, 0)))]
    pool.close()
    close_persistent_pools()


FEW = [3, pytest.param(30, marks=pytest.mark.slow)]
FEWER = [2, pytest.param(30, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_tables_are_sorted_as_duckdb_does(family: str, examples: int, tmp_path: Path) -> None:
    kinds = tables({"k": family, "other": "keys", "payload": "any"})
    hold(check_sort, st.tuples(kinds, st.booleans(), st.booleans()), examples, tmp_path)


@pytest.mark.parametrize("examples", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_random_tables_are_those_of_duckdb(family: str, examples: int, tmp_path: Path) -> None:
    kinds = tables({"k": family, "other": "keys", "v": "numbers"})
    hold(check_groups, st.tuples(kinds, st.booleans()), examples, tmp_path)


@pytest.mark.parametrize("examples", FEWER)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_row_of_each_key_is_that_of_duckdb(family: str, examples: int, tmp_path: Path) -> None:
    hold(check_distinct, tables({"k": family, "payload": "any"}), examples, tmp_path)


@pytest.mark.parametrize("examples", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_of_random_tables_are_those_of_duckdb(family: str, examples: int, tmp_path: Path) -> None:
    hold(check_joins, st.tuples(pairs_of_tables(family), st.sampled_from(list(JOINS))), examples, tmp_path)


@pytest.mark.parametrize("examples", FEWER)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_tables_keep_all_values_in_files(family: str, examples: int, tmp_path: Path) -> None:
    hold(check_files, tables({"a": family, "b": "any", "c": "any"}), examples, tmp_path)


@pytest.mark.parametrize("examples", FEW)
def test_files_of_different_kinds_of_values_have_one_schema(examples: int, tmp_path: Path) -> None:
    hold(check_parts, records_in_runs(), 2 * examples, tmp_path)


@pytest.mark.parametrize("examples", FEW)
def test_processes_write_the_same_bytes(examples: int, processes: list[JobEngine], tmp_path: Path) -> None:
    flags = st.booleans()

    def of_any_family(others: dict[str, str]) -> st.SearchStrategy[Table]:
        return st.sampled_from(list(FAMILIES)).flatmap(lambda family: tables({"k": family, **others}))

    pairs = st.sampled_from(list(FAMILIES)).flatmap(pairs_of_tables)
    checks: dict[str, tuple[Check, st.SearchStrategy[Any]]] = {
        "sort": (check_sort, st.tuples(of_any_family({"other": "keys"}), flags, flags)),
        "groups": (check_groups, st.tuples(of_any_family({"other": "keys", "v": "numbers"}), flags)),
        "distinct": (check_distinct, of_any_family({"payload": "any"})),
        "joins": (check_joins, st.tuples(pairs, st.sampled_from(list(JOINS)))),
    }
    for name, (check, cases) in checks.items():
        (tmp_path / name).mkdir()
        hold(check, cases, examples - 1, tmp_path / name, *processes)
