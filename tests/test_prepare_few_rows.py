"""Preparing data: small tables are combined by Python and larger ones by Arrow, to the same bytes."""

from __future__ import annotations

import datetime as dt
import io
import pickle
import random
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from manyhands.prepare.io.run_file import RunFileWriter
from manyhands.prepare.records import aggregate
from manyhands.prepare.records.aggregate import FEW_GROUPS, Aggregate, Grouping
from manyhands.prepare.records.keys import Keyed, KeyedTable
from manyhands.prepare.records.state_tables import FEW_ROWS, SAFE, SMALL
from manyhands.prepare.shuffle.sort_runs import CombiningWriter

COUNTS_AND_SUMS = {"n": Aggregate.count(), "sum": Aggregate.sum("whole"), "small": Aggregate.sum("byte")}

OTHERS = {
    "mean": Aggregate.mean("whole"),
    "least": Aggregate.minimum("byte"),
    "exact": Aggregate.sum("float"),
    "variance": Aggregate.variance("float"),
    "most": Aggregate.maximum("float"),
}

KEYS = ("text", "whole", "bytes", "date", "decimal", "zoned", "category")


def table_of(rows: int) -> pa.Table:
    drawn = random.Random(rows)
    text = [drawn.choice(["", "é", "\U0001f600", "user"]) + str(drawn.randrange(300)) for _ in range(rows)]
    return pa.table(
        {
            "text": text,
            "whole": [drawn.randrange(-(2**20), 2**20) for _ in range(rows)],
            "byte": pa.array([drawn.randrange(-128, 128) for _ in range(rows)], pa.int8()),
            "float": [drawn.uniform(-1, 1) * 10.0 ** drawn.randrange(-30, 30) for _ in range(rows)],
            "bytes": [value.encode() for value in text],
            "date": [dt.date(2024, 1, 1) + dt.timedelta(drawn.randrange(200)) for _ in range(rows)],
            "decimal": [Decimal(drawn.randrange(400)) / 4 for _ in range(rows)],
            "zoned": pa.array([drawn.randrange(200) * 10**9 for _ in range(rows)], pa.timestamp("ns", "Europe/Berlin")),
            "category": pa.array(text).dictionary_encode(),
        }
    )


def combined(table: pa.Table, grouping: Grouping, monkeypatch: pytest.MonkeyPatch, *, by_arrow: bool) -> Keyed:
    with monkeypatch.context() as patch:
        for name in ("FEW_ROWS", "FEW_GROUPS"):
            patch.setattr(aggregate, name, 0 if by_arrow else 2**16)
        return grouping.combine(table)


def run_bytes(grouping: Grouping, *parts: Keyed) -> bytes:
    """Return the file of a task that combines these parts. It has the sizes that decide how outputs are divided."""
    file = io.BytesIO()
    runs = RunFileWriter(file, 2**9)
    writer = CombiningWriter(runs, 2**30, grouping)
    for part in parts:
        writer.add(part)
    writer.flush()
    runs.close()
    return file.getvalue()


@pytest.mark.parametrize("key", KEYS)
def test_both_ways_write_the_same_bytes(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [((key,), COUNTS_AND_SUMS, rows) for rows in (1, 20, FEW_GROUPS - 1, FEW_ROWS - 1)]
    cases += [((key,), OTHERS, FEW_GROUPS - 1), ((key, "byte"), OTHERS, 20)]
    for by, aggregates, rows in cases:
        grouping, table = Grouping(by, aggregates), table_of(rows)
        plain, arrow = (combined(table, grouping, monkeypatch, by_arrow=way) for way in (False, True))
        assert type(plain) is type(arrow)
        if isinstance(plain, KeyedTable) or rows < FEW_GROUPS:
            assert plain.size_bytes() == arrow.size_bytes()
        assert run_bytes(grouping, plain) == run_bytes(grouping, arrow)
        assert run_bytes(grouping, plain, plain, arrow) == run_bytes(grouping, arrow, arrow, arrow)


@pytest.mark.parametrize("rows", [FEW_GROUPS - 1, FEW_GROUPS, FEW_ROWS - 1, FEW_ROWS])
def test_tables_around_the_limits_give_the_bytes_of_arrow(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for aggregates in (COUNTS_AND_SUMS, OTHERS):
        grouping, table = Grouping(("text",), aggregates), table_of(rows)
        found, arrow = grouping.combine(table), combined(table, grouping, monkeypatch, by_arrow=True)
        assert found.size_bytes() == arrow.size_bytes()
        assert run_bytes(grouping, found) == run_bytes(grouping, arrow)


@pytest.mark.parametrize("value", [SMALL - 1, SMALL, -SMALL, SAFE - 1, SAFE, -SAFE, 2**63 - 1])
def test_sums_that_may_overflow_are_exact_in_both_ways(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grouping = Grouping(("text",), {"sum": Aggregate.sum("whole")})
    for other in (0, 1 - value):
        table = pa.table({"text": ["a", "b", "a"], "whole": [value, 1, other]})
        plain, arrow = (combined(table, grouping, monkeypatch, by_arrow=way) for way in (False, True))
        assert type(plain) is type(arrow)
        assert run_bytes(grouping, *[plain] * 3) == run_bytes(grouping, *[arrow] * 3)


def test_text_that_is_not_utf_8_is_counted_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers())
    grouping, table = Grouping(("text",), {"n": Aggregate.count()}), pa.table({"text": text})
    found: Any = grouping.combine(table)
    arrow: Any = combined(table, grouping, monkeypatch, by_arrow=True)
    assert pickle.dumps(found.table) == pickle.dumps(arrow.table)
