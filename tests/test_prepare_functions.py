"""Functions of users that change their record, end early, return what is no value, or try to end the process."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.numerics.counters import derive
from manyhands.prepare.plan.plan import Output, make_plan

Aggregate = mh.Aggregate
ROWS = [{"i": i, "k": i % 2, "tags": ["b"] if i == 3 else ["a", "b"]} for i in range(10)]
ONE = "given records, partition 0, record 4"


def pick(row: dict[str, Any]) -> str:
    """The first tag `a`. Row 3 has none."""
    return next(tag for tag in row["tags"] if tag == "a")


class Tags(dict[str, Any]):
    """A record whose column raises StopIteration if it is missing."""

    def __missing__(self, name: str) -> Any:
        return next(iter([]))


class Condition:
    """A result whose truth raises StopIteration for row 3."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row

    def __bool__(self) -> bool:
        return bool(pick(self.row))


def lazily(row: dict[str, Any]) -> Any:
    """Pick in a `map` inside of a `filter`, both of which would take StopIteration for their end."""
    return filter(None, map(pick, [row, {"tags": ["a"]}]))


def picking(row: dict[str, Any]) -> Iterator[str]:
    yield pick(row)


ENDS: dict[str, Callable[[mh.Dataset], mh.Dataset]] = {
    "map": lambda made: made.map(pick),
    "filter": lambda made: made.filter(pick),
    "condition": lambda made: made.filter(Condition),
    "flat_map": lambda made: made.flat_map(pick),
    "generator": lambda made: made.flat_map(picking),
    "lazy flat_map": lambda made: made.flat_map(lazily),
    "key_by": lambda made: made.key_by(pick),
    "sort_by": lambda made: made.sort_by(pick),
    "distinct": lambda made: made.distinct(lambda row: (pick(row), row["i"])),
    "group_by": lambda made: made.group_by(lambda row: (pick(row), row["i"])).aggregate(n=Aggregate.count()),
    "of": lambda made: made.group_by("i").aggregate(tag=Aggregate.first(of=pick)),
    "start": lambda made: made.group_by("i").aggregate(tag=Aggregate(start=pick, add=max, merge=max)),
    "left": lambda made: made.join(mh.Dataset.from_records(["a"]), on=pick, other_on=str),
    "right": lambda made: mh.Dataset.from_records(["a"]).join(made, on=str, other_on=pick),
}


@pytest.mark.parametrize("way", ENDS)
def test_stop_iteration_in_a_function_is_an_error_of_its_record(way: str) -> None:
    made = ENDS[way](mh.Dataset.from_records(ROWS))
    with pytest.raises(mh.DataError, match=r"raised StopIteration: next\(\) found no item \(.*\.py:\d+\)") as caught:
        made.count(workers=0)
    assert caught.value.where == ONE
    assert made.count(workers=0, max_bad_records=1) == (18 if way == "lazy flat_map" else 9)


def test_stop_iteration_of_a_missing_column_is_an_error_of_its_record() -> None:
    made = mh.Dataset.from_records([Tags(n=1), Tags(m=2), Tags(n=0)])
    assert made.sort_by("n").map(dict).take(9, workers=0, max_bad_records=1) == [{"n": 0}, {"n": 1}]
    with pytest.raises(mh.DataError, match="StopIteration") as caught:
        made.group_by("n").aggregate(n2=Aggregate.count()).count(workers=0)
    assert caught.value.where == "given records, partition 0, record 2"


@pytest.mark.parametrize("argument", ["add", "merge", "finish"])
def test_stop_iteration_in_an_aggregate_loses_no_group(argument: str) -> None:
    def stop(*_: Any) -> Any:
        return next(iter([]))

    functions = {"start": lambda row: 1, "add": lambda n, _: n + 1, "merge": lambda n, m: n + m, argument: stop}
    records = mh.Dataset.from_records(ROWS, partition_bytes=400)
    made = records.group_by("k").aggregate(n=Aggregate(**functions), last=Aggregate.first())  # type: ignore[arg-type]
    with pytest.raises(mh.DataError, match="raised StopIteration") as caught:
        made.count(workers=0)
    assert {"add": "'n', group 0", "merge": "the group 0", "finish": "the group 0"}[argument] in str(caught.value)


def test_stop_iteration_in_a_batch_is_an_error() -> None:
    made = mh.Dataset.from_records(ROWS).map_batches(lambda table: next(iter([])))
    with pytest.raises(mh.DataError, match="map_batches lambda or a step after it raised StopIteration"):
        made.count(workers=0)


def test_given_records_do_not_end_at_a_stop_iteration() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        mh.Dataset.from_records(map(pick, ROWS))
    assert mh.Dataset.from_records(map(str, filter(None, [0, 1, 2]))).take(9, workers=0) == ["1", "2"]


async def later(row: Any) -> Any:
    return row


async def many_later(row: Any) -> AsyncIterator[Any]:
    yield row


def generate(row: Any) -> Iterator[Any]:
    yield row


class Late:
    async def __call__(self, row: Any) -> Any:
        return row

    async def method(self, row: Any) -> Any:
        return row


ASYNC = (later, many_later, functools.partial(later), functools.cache(later), Late(), Late().method)
PLACES: dict[str, Callable[[Any], mh.Dataset]] = {
    "the function of map": lambda f: mh.Dataset.from_records([1]).map(f),
    "the function of filter": lambda f: mh.Dataset.from_records([1]).filter(f),
    "the function of map_batches": lambda f: mh.Dataset.from_records([1]).map_batches(f),
    "the key of key_by": lambda f: mh.Dataset.from_records([1]).key_by(f),
    "the key of sort_by": lambda f: mh.Dataset.from_records([1]).sort_by(f),
    "the key of distinct": lambda f: mh.Dataset.from_records([1]).distinct(f),
    "the key of join": lambda f: mh.Dataset.from_records([1]).join(mh.Dataset.from_records([1]), on=len, other_on=f),
    "the function `of` of aggregate x": lambda f: grouped(Aggregate.sum(of=f)),
    "the function `start` of aggregate x": lambda f: grouped(Aggregate(start=f, add=max, merge=max)),
    "the function `add` of aggregate x": lambda f: grouped(Aggregate(start=len, add=f, merge=max)),
    "the function `merge` of aggregate x": lambda f: grouped(Aggregate(start=len, add=max, merge=f)),
    "the function `finish` of aggregate x": lambda f: grouped(Aggregate(start=len, add=max, merge=max, finish=f)),
}


def grouped(aggregate: mh.Aggregate) -> mh.Dataset:
    return mh.Dataset.from_records([1]).group_by().aggregate(x=aggregate)


@pytest.mark.parametrize("place", PLACES)
def test_async_and_generator_functions_are_refused_at_once(place: str) -> None:
    for function in ASYNC:
        with pytest.raises(mh.ConfigError, match=f"^{place} is an async function"):
            PLACES[place](function)
    for function in (generate, functools.partial(generate), functools.cache(generate)):
        with pytest.raises(mh.ConfigError, match=f"^{place} is a generator function"):
            PLACES[place](function)
    if not place.startswith("the key"):  # a key may be a column
        with pytest.raises(mh.ConfigError, match=f"^{place} is not a function"):
            PLACES[place](3)


def test_flat_map_takes_generator_functions_but_no_async_ones() -> None:
    made = mh.Dataset.from_records([1, 2])
    assert made.flat_map(functools.partial(generate)).take(9, workers=0) == [1, 2]
    for function in ASYNC:
        with pytest.raises(mh.ConfigError, match="the function of flat_map is an async function"):
            made.flat_map(function)


def test_a_coroutine_that_the_function_runs_itself_is_allowed() -> None:
    @functools.wraps(later)
    def run(row: Any) -> Any:
        return asyncio.run(later(row))

    assert mh.Dataset.from_records([1, 2]).map(run).take(9, workers=0) == [1, 2]


@pytest.mark.parametrize("returned", [later, generate, many_later, lambda row: filter(None, [row])])
def test_a_result_that_must_still_be_run_is_an_error_of_its_record(returned: Callable[[Any], Any]) -> None:
    made = mh.Dataset.from_records(list(range(5)))

    def sometimes(row: int) -> Any:
        return returned(row) if row == 3 else row + 1

    jobs = [made.filter(sometimes), made.key_by(sometimes), made.sort_by(sometimes), made.distinct(sometimes)]
    jobs.append(made.group_by(lambda row: 1).aggregate(x=Aggregate.sum(of=sometimes)))
    if returned in (later, generate, many_later):  # other iterators can be pickled, so they may be records
        jobs.append(made.map(sometimes))
        jobs.append(grouped(Aggregate(start=lambda row: returned(row), add=max, merge=max)))
    for job in jobs:
        with pytest.raises(mh.DataError, match=r"(sometimes|lambda) returned a \w+, not a value") as caught:
            job.count(workers=0)
        assert caught.value.where in (ONE, "given records, partition 0, record 1")
    with pytest.raises(mh.DataError, match=r"finish of the aggregate 'x' failed: lambda returned a \w+, not a value"):
        grouped(Aggregate(start=int, add=max, merge=max, finish=lambda row: returned(row))).count(workers=0)


def write_lines(path: Path, count: int) -> None:
    """Lines with x = 0. Line 4 is no JSON; rows 40, 41 and 99 say that they are bad."""
    lines = [json.dumps({"i": i, "x": 0, "bad": i in (40, 41, 99)}) for i in range(1, count + 1)]
    lines[3] = "{"
    path.write_text("\n".join(lines) + "\n")


def increment(row: dict[str, Any]) -> dict[str, Any]:
    row["x"] += 1
    return row


def check(row: dict[str, Any]) -> dict[str, Any]:
    """Increment, and raise for a bad row, and for one that comes a second time."""
    row["x"] += 10
    if row["bad"] or row["x"] != 11:
        raise ValueError(f"x is {row['x']}")
    return row


def test_records_beside_a_bad_one_are_changed_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", 200)
    made = mh.Dataset.read(str(tmp_path / "a.jsonl")).map(increment).map(check)
    with pytest.raises(mh.DataError, match=r"check raised ValueError: x is 11 \(") as caught:
        made.count(workers=0, max_bad_records=1)
    assert caught.value.where == f"{tmp_path}/a.jsonl, line 40"  # line 4 was the first
    assert caught.value.got == "{'i': 40, 'x': 0, 'bad': True}"
    ends = {
        "map": made,
        "sort": made.sort_by("i"),
        "group": made.group_by("i").aggregate(x=Aggregate.sum(of="x")),
        "batch": made.map_batches(lambda table: table),
        "shuffle": made.shuffle(seed=1),
    }
    for name, job in ends.items():
        rows = job.take(300, workers=0, max_bad_records=4)
        assert (len(rows), {row["x"] for row in rows}) == (196, {11}), name
    written = made.write(str(tmp_path / "out"), workers=1, max_bad_records=4, progress=False)
    assert (written.records, written.bad_records) == (196, 4)
    bad = [json.loads(line) for line in (tmp_path / "out" / "_bad_records.jsonl").read_text().splitlines()]
    assert [entry["where"].rpartition(" ")[2] for entry in bad] == ["4", "40", "41", "99"]
    assert bad[1]["record"] == "{'i': 40, 'x': 0, 'bad': True}"


def test_the_right_chunk_is_read_again(tmp_path: Path) -> None:
    """A split of four chunks of 512 KiB, with bad rows in the second and the fourth, and a line that is no JSON."""
    rows = [{"i": i, "x": 0, "bad": i in (1_700, 4_700), "text": "x" * 400} for i in range(5_000)]
    lines = [json.dumps(row) for row in rows]
    lines[1_699] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    checked = mh.Dataset.read(str(tmp_path / "a.jsonl")).map(increment).map(check)
    found = checked.group_by("x").aggregate(n=Aggregate.count(), i=Aggregate.sum(of="i"))
    expected = sum(range(5_000)) - 1_699 - 1_700 - 4_700
    assert found.take(9, workers=0, max_bad_records=3) == [{"x": 11, "n": 4_997, "i": expected}]


def test_records_that_cannot_be_pickled_are_made_again() -> None:
    made = mh.Dataset.from_records([{"i": i} for i in range(5)]).group_by("i")
    groups = made.aggregate(x=Aggregate(start=len, add=max, merge=max, finish=lambda n: [n, threading.Lock()]))

    def enter(row: dict[str, Any]) -> int:
        if not row["x"][1].acquire(blocking=False) or row["i"] == 3:  # False if the lock was taken before
            raise ValueError("no")
        return int(row["i"])

    assert groups.map(enter).take(9, workers=0, max_bad_records=1) == [0, 1, 2, 4]


def test_bad_records_leave_the_bytes_of_the_others(tmp_path: Path) -> None:
    """Written as if the bad records had never been there, with any workers and memory, before and after a shuffle."""
    for name, bad in (("with", {5, 6, 300, 1999}), ("without", set())):
        lines = [{"i": i, "x": 0, "bad": i in bad} for i in range(2000) if bad or i not in (5, 6, 300, 1999)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def job(name: str) -> mh.Dataset:
        read = mh.Dataset.read(str(tmp_path / f"{name}.jsonl"))
        checked = read.map(increment).map(check).repartition().map(increment)
        return checked.map(lambda row: {**row, "bad": row["i"] % 7 == 0, "x": row["x"] - 12}).map(increment).map(check)

    def written(name: str, **how: Any) -> dict[str, bytes]:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        summary = job(name).write(str(folder), max_bad_records=400, progress=False, **how)
        assert summary.records == 2000 - 4 - 286
        assert summary.bad_records == 286 + (4 if name == "with" else 0)
        return {file: (folder / file).read_bytes() for file in summary.files}

    clean = written("without", workers=0)
    assert written("with", workers=0) == clean
    assert written("with", workers=2, memory="400MiB") == clean
    assert written("with", workers=3, memory="4GiB") == clean


def test_bad_records_leave_the_random_numbers_of_the_others(tmp_path: Path) -> None:
    def draw(row: int) -> float:
        drawn = random.random()
        if row == 2:
            raise ValueError("bad")
        return drawn

    made = mh.Dataset.from_records(list(range(5))).map(draw)
    made.write(str(tmp_path / "out"), workers=0, max_bad_records=1, progress=False)
    stage = make_plan(made._node, Output("jsonl", None)).stages[-1]
    numbers = random.Random(derive(0, "task", stage.identity, 0))
    written = [json.loads(line) for line in (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()]
    assert written == [numbers.random() for _ in range(4)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "chunks"])
def test_the_record_that_fails_is_named_from_any_source(tmp_path: Path, suffix: str) -> None:
    """Every record fails if it is processed twice, so a rerun of the same objects would blame the first one."""
    rows = [{"i": i, "x": 1, "bad": i == 150} for i in range(200)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = mh.Dataset.read(str(path if suffix == "parquet" else path.with_suffix(".jsonl")))
    if suffix == "chunks":
        made = made.map(dict).cache(str(tmp_path / "cache"))
    with pytest.raises(mh.DataError, match="check raised ValueError: x is 11") as caught:
        made.map(check).count(workers=0)
    assert str(caught.value.where).endswith({"jsonl": "line 151", "parquet": "row 151", "chunks": "record 151"}[suffix])
    assert made.map(check).count(workers=0, max_bad_records=1) == 199


def test_sample_and_shuffle_keep_the_positions_of_records_after_a_bad_one(tmp_path: Path) -> None:
    rows = [{"i": i, "x": 1, "bad": i == 20} for i in range(100)]
    made = mh.Dataset.from_records(rows)
    sampled = [row["i"] for row in made.map(dict).sample(0.5, seed=3).take(100, workers=0)]
    checked = made.map(check).sample(0.5, seed=3).take(100, workers=0, max_bad_records=1)
    late = [row["i"] for row in made.sample(0.5, seed=3).map(check).take(100, workers=0, max_bad_records=1)]
    assert late == [i for i in sampled if i != 20]
    # The bad record never reached `sample`, so later records have the positions that they have without it.
    without = mh.Dataset.from_records([row for row in rows if not row["bad"]])
    assert checked == without.map(check).sample(0.5, seed=3).take(100, workers=0)


def test_given_records_are_copied_when_they_are_given() -> None:
    one = {"x": 0, "list": [1]}
    given = [one, one, {"x": 0, "list": one["list"]}]

    def change(row: dict[str, Any]) -> tuple[int, int]:
        row["x"] += 1
        row["list"].append(2)
        return row["x"], len(row["list"])

    made = mh.Dataset.from_records(given).map(change)
    one["x"] = 5
    assert made.take(9, workers=0) == made.take(9, workers=0) == [(1, 2)] * 3
    assert given == [{"x": 5, "list": [1]}] * 2 + [{"x": 0, "list": [1]}]


@pytest.mark.parametrize("how", ["inner", "left", "right", "outer"])
@pytest.mark.parametrize("partition_bytes", [2**12, 2**25])  # the key has a range of its own, or not
def test_the_pairs_of_a_join_share_no_record(how: str, partition_bytes: int) -> None:
    def bump(pair: Any) -> list[int]:
        for side in pair:
            if side is not None:
                side["n"].append(1)
        return [-1 if side is None else len(side["n"]) for side in pair]

    lefts = [{"k": 1, "n": []} for _ in range(50)] + [{"k": 2, "n": []}]
    rights = [{"k": 1, "n": []} for _ in range(40)] + [{"k": 3, "n": []}]
    left, right = (mh.Dataset.from_records(side, partition_bytes=partition_bytes) for side in (lefts, rights))
    found = left.join(right, on="k", how=how).map(bump).take(9999, workers=0)
    extra = {"inner": [], "left": [[1, -1]], "right": [[-1, 1]], "outer": [[1, -1], [-1, 1]]}[how]
    assert sorted(found) == sorted([[1, 1]] * 2000 + extra)


def test_the_pairs_of_a_join_that_does_not_fit_into_memory_share_no_record() -> None:
    def bump(pair: Any) -> list[int]:
        for side in pair:
            side["n"] += 1
        return [side["n"] for side in pair]

    lefts = mh.Dataset.from_records([{"k": 1, "n": 0, "i": i} for i in range(3)])
    rights = mh.Dataset.from_records(
        [{"k": 1, "n": 0, "text": str(i) * 200_000} for i in range(30)], partition_bytes=2**18
    )
    for memory in ("192MiB", "4GiB"):  # of the first, 6.4 MiB for records
        assert lefts.join(rights, on="k").map(bump).take(99, workers=0, memory=memory) == [[1, 1]] * 90


def test_a_join_with_itself_shares_no_record() -> None:
    made = mh.Dataset.from_records([{"k": 1, "n": 0}] * 3)

    def bump(pair: Any) -> int:
        pair[0]["n"] += 1
        return pair[1]["n"] * 10 + pair[0]["n"]  # type: ignore[no-any-return]

    assert made.join(made, on="k").map(bump).take(99, workers=0) == [1] * 9


def add_in_place(state: dict[str, int], row: dict[str, int]) -> dict[str, int]:
    state["i"] += row["i"]
    return state


def test_aggregates_share_no_record() -> None:
    total = Aggregate(start=lambda row: row, add=add_in_place, merge=add_in_place, finish=lambda row: row["i"])
    made = mh.Dataset.from_records([{"i": i} for i in range(1, 11)], partition_bytes=100)
    groups = made.group_by(lambda row: 0).aggregate(
        total=total, n=Aggregate.sum(of="i"), first=Aggregate.first(), all=Aggregate.collect(), again=total
    )
    (group,) = groups.take(9, workers=0)
    expected = {"key": 0, "total": 55, "n": 55, "first": {"i": 1}, "all": [{"i": i} for i in range(1, 11)], "again": 55}
    assert group == expected

    def change(row: dict[str, Any]) -> Any:
        row["first"]["i"] = 99
        return row["all"][0]

    assert groups.map(change).take(9, workers=0) == [{"i": 1}]


def test_an_aggregate_that_takes_a_record_as_its_state_changes_no_other() -> None:
    def later(state: dict[str, int], row: dict[str, int]) -> dict[str, int]:
        """The last even record, which counts the odd ones after it."""
        if row["i"] % 2 == 0:
            return row
        state["n"] += 1
        return state

    rows = [{"i": i, "n": 0} for i in (1, 2, 3, 4, 5, 7, 9)]
    last = Aggregate(start=lambda row: row, add=later, merge=later)
    made = mh.Dataset.from_records(rows).group_by(lambda row: 0)
    for first in (True, False):
        aggregates = {"last": last, "all": Aggregate.collect()}
        group = made.aggregate(**(aggregates if first else dict(reversed(aggregates.items())))).take(1, workers=0)
        assert group == [{"key": 0, "last": {"i": 4, "n": 3}, "all": rows}]


def test_flat_map_makes_a_record_of_an_object_each_time_it_is_returned() -> None:
    def number(row: dict[str, int]) -> Iterator[dict[str, int]]:
        for row["x"] in range(3):
            yield row

    made = mh.Dataset.from_records([{"x": 7}, {"x": 8}])
    assert made.flat_map(number).map(increment).take(9, workers=0) == [{"x": 1}, {"x": 2}, {"x": 3}] * 2
    assert made.flat_map(lambda row: [row, row]).map(increment).take(9, workers=0) == [{"x": 8}] * 2 + [{"x": 9}] * 2


def header_and_one_dict(_: Any) -> Iterator[Any]:
    row = {"x": 0}
    yield {"header": True}
    for row["x"] in (1, 2, 3):
        yield row


def alternating(_: Any) -> Iterator[Any]:
    pair: tuple[dict[str, Any], dict[str, Any]] = ({"x": [0]}, {"x": [0]})
    for n in range(5):
        pair[n % 2]["x"][0] = n
        yield pair[n % 2]


def sets_and_tuples(_: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for n in (1, 2):
        yield n
        seen.add(n)
        yield seen
        yield n, seen


class Reusing:
    """Iterates with one list; `__iter__` is a generator function."""

    def __init__(self, _: Any) -> None:
        self.row = [0, 0]

    def __iter__(self) -> Iterator[list[int]]:
        for self.row[0] in range(3):
            yield self.row

    def __len__(self) -> int:
        return 3


REUSED: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "after another": (header_and_one_dict, [{"header": True}, {"x": 1}, {"x": 2}, {"x": 3}]),
    "alternating": (alternating, [{"x": [n]} for n in range(5)]),
    "sets and tuples": (sets_and_tuples, [1, {1}, (1, {1}), 2, {1, 2}, (2, {1, 2})]),
    "own iterable": (Reusing, [[0, 0], [1, 0], [2, 0]]),
    "chain": (lambda _: itertools.chain(["a"], alternating(_)), ["a", *({"x": [n]} for n in range(5))]),
    "map": (lambda _: map(itemgetter(0), zip(alternating(_), strict=True)), [{"x": [n]} for n in range(5)]),
}


@pytest.mark.parametrize("way", REUSED)
def test_a_record_of_flat_map_has_the_values_that_it_had_when_it_was_yielded(way: str) -> None:
    function, expected = REUSED[way]
    assert mh.Dataset.from_records([0, 1]).flat_map(function).take(99, workers=0) == expected * 2


def test_records_that_fail_only_together_are_reported_with_their_range() -> None:
    made = mh.Dataset.from_records([1, [3], 2]).group_by(lambda row: 0).aggregate(total=Aggregate.sum())
    with pytest.raises(
        mh.DataError, match="records fail together, but not one by one: group by lambda: total"
    ) as caught:
        made.count(workers=0, max_bad_records=9)
    assert caught.value.where == (
        "a batch of 3 records, from given records, partition 0, record 1 to given records, partition 0, record 3"
    )
    assert caught.value.got == "in the aggregate 'total', group 0"


def test_merge_and_finish_name_the_group() -> None:
    made = mh.Dataset.from_records([1, "a", 2, "b"], partition_bytes=10).group_by(lambda row: "g")
    with pytest.raises(mh.DataError, match="merge of the aggregate 'low' failed: min raised TypeError: '<' not") as one:
        made.aggregate(low=Aggregate.minimum()).count(workers=0)
    assert one.value.where == "the group 'g'"

    def halve(state: int) -> float:
        return 1 / (state - 2)

    halves = Aggregate(start=lambda row: len(str(row)), add=max, merge=lambda a, b: a + b, finish=halve)
    made = mh.Dataset.from_records([1, 2, 3, 4]).group_by(lambda row: row).aggregate(h=halves)
    assert [row["h"] for row in made.take(9, workers=0)] == [-1] * 4
    made = mh.Dataset.from_records([1, 22, 3, 4]).group_by().aggregate(h=halves)
    with pytest.raises(
        mh.DataError, match=r"finish of the aggregate 'h' failed: halve raised ZeroDivisionError.*\.py:\d+"
    ):
        made.count(workers=0)
    with pytest.raises(mh.DataError) as two:
        made.count(workers=1)
    assert two.value.where == "the group 22"
    assert "in halve" in str(two.value.detail)


class Stop(BaseException):
    """An exception that `except Exception` doesn't catch."""


@pytest.mark.parametrize("raised", [SystemExit("no more"), KeyboardInterrupt(), Stop()])
def test_a_function_that_ends_the_process_is_reported_with_its_record(raised: BaseException) -> None:
    def leave(row: dict[str, Any]) -> int:
        if row["i"] == 3:
            raise raised
        return int(row["i"])

    made = mh.Dataset.from_records(ROWS)
    jobs = [made.map(leave), made.sort_by(leave), made.group_by("i").aggregate(n=Aggregate.sum(of=leave))]
    in_worker = not isinstance(raised, Stop)  # Ctrl-C ends a job that runs in this process
    for job in jobs[:1] if in_worker else jobs:
        with pytest.raises(mh.DataError) as caught:
            job.count(workers=1 if in_worker else 0, max_bad_records=9)
        assert caught.value.what.startswith(
            f"a function tried to end the process: leave raised {type(raised).__name__}"
        )
        assert (caught.value.where, caught.value.got) == (ONE, str(ROWS[3]))


def test_a_function_that_ends_the_process_is_reported_with_its_group() -> None:
    leaving = Aggregate(start=len, add=max, merge=max, finish=lambda state: sys.exit(0))
    with pytest.raises(mh.DataError, match="finish of the aggregate 'x' failed: lambda raised SystemExit: 0") as caught:
        mh.Dataset.from_records(["a"]).group_by().aggregate(x=leaving).take(1, workers=0)
    assert caught.value.where == "the group 'a'"


def test_a_script_whose_function_exits_does_not_end_quietly(tmp_path: Path) -> None:
    script = "import sys\nimport manyhands as mh\nmh.Dataset.from_records([1]).map(lambda x: sys.exit(0)).take(1)\n"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a function tried to end the process" in done.stderr


def test_take_needs_a_number_of_records() -> None:
    made = mh.Dataset.from_records([1, 2, 3])
    for wrong in (-1, True, 2.5, "2", None):
        with pytest.raises(
            mh.ConfigError, match="take needs the number of records, an integer of at least 0"
        ) as caught:
            made.take(wrong, workers=0)  # type: ignore[arg-type]
        assert caught.value.got == repr(wrong)
    assert made.take(0, workers=0) == []
    assert made.take(np.int64(2), workers=0) == [1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [["a", "a"], []])
def test_batches_whose_rows_are_no_records_are_refused(names: list[str]) -> None:
    import pyarrow as pa

    table = pa.table([[2, 1]] * len(names), names=names)
    with pytest.raises(mh.DataError, match="returned a batch whose rows are not records"):
        mh.Dataset.from_records([{"x": 1}]).map_batches(lambda batch: table).count(workers=0)


def test_a_bad_record_may_hold_an_integer_that_python_does_not_print() -> None:
    made = mh.Dataset.from_records([10**5000]).map(lambda n: n / 0)
    assert made.count(workers=0, max_bad_records=1) == 0
