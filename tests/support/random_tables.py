"""Random tables of all Arrow types that Parquet has, and what their values are as Python's and as DuckDB's.

A value is drawn as a plain number, text or bytes whose order is that of the type: times and durations are numbers of
the type's unit. So the expected values do not come from the conversions of pyarrow, which the package uses, too.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
NAN, INF = float("nan"), float("inf")
ENDS_OF_SUMMER = {"Europe/Berlin": 1698541200, "America/New_York": 1699164000}  # the clock goes back an hour
PER_DAY = 86_400
LAST_SECOND = 253402300799  # of the year 9999 in UTC


class NoPythonForm(Exception):
    """Python's type can't hold the value."""


@dataclass(frozen=True)
class Kind:
    """A type of columns: its values in plain form, and what they are in Python and for DuckDB.

    family: kinds of one family have comparable keys. in_duckdb: returns a value of DuckDB with the same order.
    """

    name: str
    type: Any
    values: st.SearchStrategy[Any]
    family: str
    in_python: Callable[[Any], Any] = lambda value: value
    in_duckdb: Callable[[Any], Any] = lambda value: value
    duckdb_type: Any = None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.name)

    def array(self, values: Sequence[Any]) -> Any:
        """Return an Arrow array of plain values."""
        return array_of(self.type, values)

    def is_shown(self, value: Any) -> bool:
        """True if Python's type can hold the value."""
        try:
            value is None or self.in_python(value)
        except NoPythonForm:
            return False
        return True

    def shown(self, value: Any) -> Any:
        """Return the value's Python form as text that shows its type and every bit."""
        return flat(None if value is None else self.in_python(value))


def array_of(kind: Any, values: Sequence[Any]) -> Any:
    """Return an Arrow array of plain values."""
    if pa.types.is_float16(kind):
        found = np.array([0.0 if value is None else value for value in values], np.float16)
        return pa.array(found, mask=np.array([value is None for value in values], bool))
    if pa.types.is_temporal(kind):
        width = pa.int32() if kind.bit_width == 32 else pa.int64()
        return pa.array(values, width).cast(kind)
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    return pa.array(values, kind)


def _flat() -> Callable[[Any], Any]:
    def flat(value: Any) -> Any:
        """Return a Python value as text that shows its type and every bit, also inside of containers.

        Times with a zone show their offset. The name of the zone's class depends on the packages that are installed.
        """
        if isinstance(value, dict):
            return {name: flat(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [flat(item) for item in value]
        if isinstance(value, datetime):
            return f"datetime {value.isoformat()}"
        if isinstance(value, float):
            return "nan" if value != value else value.hex()
        return repr(value)

    return flat


flat = _flat()  # pickled by value: workers that import this module would be replaced after each job


def plain_of(scalar: Any) -> Any:
    """Return a scalar of Arrow as a value that equals only the same one: NaN equals NaN, and 0.0 differs from -0.0."""
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if pa.types.is_struct(kind):
        return [(name, plain_of(item)) for name, item in scalar.items()]
    if pa.types.is_nested(kind):
        return [plain_of(item) for item in scalar.values]
    if pa.types.is_dictionary(kind):
        return plain_of(scalar.value)
    if pa.types.is_floating(kind):
        value = float(scalar.as_py())
        return "nan" if value != value else struct.pack("d", value)
    return scalar.value if pa.types.is_temporal(kind) else scalar.as_py()


def plain_rows(table: pa.Table) -> list[tuple[Any, ...]]:
    """Return the rows of a table as tuples of `plain_of`."""
    columns = [[plain_of(scalar) for scalar in column] for column in table.columns]
    return list(zip(*columns, strict=True)) if columns else []


def _ints(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    edges = [0, 1, -1, low, high, high - 1, 2**53, 2**53 + 1, 2**47, -(2**53) - 1]
    return st.sampled_from([edge for edge in edges if low <= edge <= high]) | st.integers(low, high)


def _floats(width: int) -> st.SearchStrategy[float]:
    edges = [0.0, -0.0, NAN, NAN, INF, -INF, 0.5]
    edges += {16: [65504.0], 32: [2.0**24], 64: [1e16, -1e16, 1.0, 2.0**53, 0.1, 5e-324, 1e308, -1e308]}[width]
    return st.sampled_from(edges) | st.floats(width=width)  # type: ignore[arg-type]


def _time(kind: str, unit: str, zone: Any, ticks: int) -> Any:
    """Return Python's time stamp, time of day or duration of a number of ticks. Raises NoPythonForm."""
    microseconds, rest = divmod(ticks * 10**9 // PER_SECOND[unit], 1000)
    if rest:
        raise NoPythonForm
    try:
        since = timedelta(microseconds=microseconds)
        if kind == "duration":
            return since
        if kind == "time of day":
            return (datetime.min + since).time()
        if zone is None:
            return datetime(1970, 1, 1) + since
        return (datetime(1970, 1, 1, tzinfo=UTC) + since).astimezone(zone)
    except OverflowError:
        raise NoPythonForm from None


def _stamps(unit: str, ends: Sequence[int]) -> st.SearchStrategy[int]:
    """Ticks around these ends of summer time, some an hour or a tick apart, and a few far from now."""
    factor = PER_SECOND[unit]
    near = st.builds(
        lambda end, seconds, ticks: (end + seconds) * factor + ticks,
        st.sampled_from(ends),
        st.sampled_from([-1800, 1800, -1800, 1800, 0, -3600, 3600, 7200]),
        st.sampled_from([0, 0, 0, 0, 1, 1000] if unit == "ns" else [0]),
    )
    far = [0, -1000, -(10**9) * factor] + ([316_000_000_000 * factor] if unit != "ns" else [2**63 - 1])
    return near | near | near | st.sampled_from(far)


def _in_nanoseconds(unit: str) -> Callable[[int], Decimal]:
    return lambda ticks: Decimal(ticks * (10**9 // PER_SECOND[unit]))


def _day(days: int) -> date:
    try:
        return date(1970, 1, 1) + timedelta(days=days)
    except OverflowError:
        raise NoPythonForm from None


_TICKS = pa.decimal128(38)  # DuckDB has no times in nanoseconds for all types, and no years beyond 290,000
_ZONES = {
    "UTC": UTC,
    "Europe/Berlin": ZoneInfo("Europe/Berlin"),
    "America/New_York": ZoneInfo("America/New_York"),
    "+05:30": timezone(timedelta(hours=5, minutes=30)),
}


def _times() -> list[Kind]:
    kinds = []
    for unit in PER_SECOND:
        duckdb = {"in_duckdb": _in_nanoseconds(unit), "duckdb_type": _TICKS}
        for name, zone in (("", None), *_ZONES.items()):
            if unit in ("s", "ms") and name not in ("", *ENDS_OF_SUMMER):
                continue  # so that more of the columns have a zone with summer time
            kinds.append(
                Kind(
                    f"timestamp {unit} {name}",
                    pa.timestamp(unit, name or None),
                    _stamps(unit, [ENDS_OF_SUMMER[name]] if name in ENDS_OF_SUMMER else [*ENDS_OF_SUMMER.values()]),
                    "stamps with a zone" if name else "stamps",
                    partial(_time, "time stamp", unit, zone),
                    **duckdb,
                )
            )
        per_day = PER_DAY * PER_SECOND[unit]
        kinds.append(
            Kind(
                f"time {unit}",
                (pa.time32 if unit in ("s", "ms") else pa.time64)(unit),
                st.sampled_from([0, 1, 1000, per_day - 1]) | st.integers(0, per_day - 1),
                "times of day",
                partial(_time, "time of day", unit, None),
                **duckdb,
            )
        )
        edges = [0, 1, -1, 1000, -(10**9), 2**62, 10**14 if unit == "s" else 2**61]
        kinds.append(
            Kind(
                f"duration {unit}",
                pa.duration(unit),
                st.sampled_from(edges) | st.integers(-(2**40), 2**40),
                "durations",
                partial(_time, "duration", unit, None),
                **duckdb,
            )
        )
    days = st.integers(-719162, 2932896) | st.sampled_from([0, 1, -719162, 2932896, 2932897, 2**30])
    kinds.append(Kind("date32", pa.date32(), days, "dates", _day, duckdb_type=pa.int32()))
    # In milliseconds; DuckDB gets the days.
    kinds.append(
        Kind(
            "date64",
            pa.date64(),
            days.map(lambda day: day * PER_DAY * 1000),
            "dates",
            lambda value: _day(value // (PER_DAY * 1000)),
            lambda value: value // (PER_DAY * 1000),
            pa.int32(),
        )
    )
    return kinds


def _kinds() -> list[Kind]:
    kinds = []
    for bits in (8, 16, 32, 64):
        for prefix, signed in (("int", True), ("uint", False)):
            kinds.append(Kind(f"{prefix}{bits}", getattr(pa, f"{prefix}{bits}")(), _ints(bits, signed=signed), "ints"))
    for width in (16, 32, 64):
        kind = getattr(pa, f"float{width}")()
        kinds.append(Kind(f"float{width}", kind, _floats(width), "floats", duckdb_type=pa.float64()))
    for name, kind, digits, scale in (
        ("decimal small", pa.decimal128(9, 2), 9, 2),
        ("decimal128", pa.decimal128(38, 10), 38, 10),
        ("decimal256", pa.decimal256(60, 10), 60, 10),
    ):
        whole = st.integers(-(10**digits) + 1, 10**digits - 1) | st.sampled_from([0, 1, -1, 10**digits - 1])
        # Not by arithmetic of decimals, which rounds to 28 digits. DuckDB holds 38 digits, so it gets ordered text.
        values = whole.map(lambda n, scale=scale: Decimal((int(n < 0), tuple(map(int, str(abs(n)))), -scale)))
        as_text = {"in_duckdb": _ordered_text, "duckdb_type": pa.string()} if digits > 38 else {}
        kinds.append(Kind(name, kind, values, name, **as_text))
    long = "manyhands" * 9  # longer than the prefix that is compared as integers
    edges = ["", "a", "a\0", "ab", "\uffff", "\U00010000", "é", "e\u0301", long, long + "\0", long + "a"]
    texts = st.sampled_from(edges) | st.text(max_size=9)
    for name, kind in (("string", pa.string()), ("large_string", pa.large_string())):
        kinds.append(Kind(name, kind, texts, "texts"))
    data = st.sampled_from([edge.encode() for edge in edges]) | st.binary(max_size=9)
    for name, kind in (("binary", pa.binary()), ("large_binary", pa.large_binary())):
        kinds.append(Kind(name, kind, data, "bytes"))
    kinds.append(Kind("fixed_size_binary", pa.binary(3), st.binary(min_size=3, max_size=3), "bytes"))
    kinds.append(Kind("dictionary", pa.dictionary(pa.int32(), pa.string()), texts, "texts", duckdb_type=pa.string()))
    kinds.append(Kind("bool", pa.bool_(), st.booleans(), "bools"))
    return kinds + _times()


def _ordered_text(value: Decimal) -> str:
    sign, digits, _ = value.as_tuple()
    whole = int("".join(map(str, digits))) * (-1 if sign else 1)
    return f"{whole + 10**70:071d}"


KEYS = {kind.name: kind for kind in _kinds()}
"""The kinds whose columns may be keys."""

NUMBERS = [kind for kind in KEYS.values() if kind.family in ("ints", "floats") or "decimal" in kind.name]
NUMBERS += 2 * [kind for kind in KEYS.values() if kind.family == "floats"]  # more often than the others

FAMILIES = {family: [kind for kind in KEYS.values() if kind.family == family] for family in ("ints", "floats", "texts")}
FAMILIES |= {
    "bytes and truth values": [kind for kind in KEYS.values() if kind.family in ("bytes", "bools")],
    "decimals": [kind for kind in KEYS.values() if "decimal" in kind.family],
    "dates": [kind for kind in KEYS.values() if kind.family == "dates"],
    "durations and times of day": [kind for kind in KEYS.values() if kind.family in ("times of day", "durations")],
    "stamps": [kind for kind in KEYS.values() if kind.family == "stamps"],
    "stamps with a zone": [kind for kind in KEYS.values() if kind.family == "stamps with a zone"],
}
"""Kinds to draw from, so that every run has some of each."""

_INSTANT = pa.timestamp("us", "Europe/Berlin")


def _instant(ticks: int) -> datetime:
    found = _time("time stamp", "us", _ZONES["Europe/Berlin"], ticks)
    assert isinstance(found, datetime)
    return found


_small = st.none() | st.sampled_from([0, -1, 2**53 + 1, 2**63 - 1])
_point = st.none() | st.fixed_dictionaries({"x": _small, "t": st.none() | st.text(max_size=3)})
_near_end = st.builds(lambda n: (ENDS_OF_SUMMER["Europe/Berlin"] + 1800 * n) * 10**6, st.integers(-3, 3)).map(_instant)

NESTED = [
    Kind("null", pa.null(), st.none(), ""),
    Kind("list", pa.list_(pa.int64()), st.lists(_small, max_size=3), ""),
    Kind("large_list", pa.large_list(pa.string()), st.lists(st.none() | st.text(max_size=3), max_size=3), ""),
    Kind("fixed_size_list", pa.list_(pa.float64(), 2), st.lists(_floats(64), min_size=2, max_size=2), ""),
    Kind("struct", pa.struct({"x": pa.int64(), "t": pa.string()}), _point, ""),
    Kind("structs", pa.list_(pa.struct({"x": pa.int64(), "t": pa.string()})), st.lists(_point, max_size=2), ""),
    Kind("instants", pa.list_(_INSTANT), st.lists(st.none() | _near_end, max_size=3), ""),
    Kind("map", pa.map_(pa.string(), pa.int64()), st.dictionaries(st.text(max_size=2), _small, max_size=2), ""),
]
NESTED[-1] = Kind("map", NESTED[-1].type, NESTED[-1].values.map(lambda pairs: list(pairs.items())), "")


@dataclass(frozen=True)
class Column:
    """A column of plain values, None for nulls."""

    kind: Kind
    values: list[Any]

    def is_key(self, row: int) -> bool:
        """True if the value has a place in the order of keys: it is neither null nor NaN."""
        value = self.values[row]
        return value is not None and not (isinstance(value, float) and math.isnan(value))

    def is_shown(self, row: int) -> bool:
        """True if Python's type can hold the value."""
        return self.kind.is_shown(self.values[row])

    def shown(self, row: int) -> Any:
        """Return a value as Python's, as text."""
        return self.kind.shown(self.values[row])

    def array(self) -> Any:
        """Return the column as an Arrow array."""
        return self.kind.array(self.values)

    def for_duckdb(self) -> Any:
        """Return the column as an Arrow array of a type that DuckDB holds exactly, with the same order."""
        found = [None if value is None else self.kind.in_duckdb(value) for value in self.values]
        return pa.array(found, self.kind.duckdb_type or self.kind.type)


@dataclass(frozen=True)
class Table:
    """Columns by name. An int64 column "i" numbers the rows."""

    columns: dict[str, Column]
    rows: int

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"{self.rows} rows of " + ", ".join(f"{n}: {c.kind.name}" for n, c in self.columns.items()))

    def arrow(self) -> pa.Table:
        """Return the table as it is written to a file."""
        arrays = {name: column.array() for name, column in self.columns.items()}
        return pa.table({"i": pa.array(range(self.rows), pa.int64()), **arrays})

    def for_duckdb(self, names: Sequence[str], is_good: Callable[[int], bool]) -> pa.Table:
        """Return these columns for DuckDB, of the rows that are no bad records."""
        arrays = {name: self.columns[name].for_duckdb() for name in names}
        table = pa.table({"i": pa.array(range(self.rows), pa.int64()), **arrays})
        return table.take(pa.array([row for row in range(self.rows) if is_good(row)], pa.int64()))

    def shown(self, row: int) -> dict[str, Any]:
        """Return a row as Python's values, as text."""
        return {"i": repr(row), **{name: column.shown(row) for name, column in self.columns.items()}}

    def are_shown(self, row: int) -> bool:
        """True if Python's types can hold all values of a row."""
        return all(column.is_shown(row) for column in self.columns.values())

    def are_keys(self, names: Sequence[str], row: int) -> bool:
        """True if all values have a place in the order of keys."""
        return all(self.columns[name].is_key(row) for name in names)


_COMPARABLE = {kind.family: [other for other in KEYS.values() if other.family == kind.family] for kind in KEYS.values()}
_ALL_FAMILIES = FAMILIES | _COMPARABLE
_ALL_FAMILIES |= {"keys": list(KEYS.values()), "numbers": NUMBERS, "any": [*KEYS.values(), *NESTED]}


@st.composite
def tables(draw: Any, families: dict[str, str], *, max_rows: int = 150) -> Table:
    """Draw a table. Each column has a kind of its family.

    A column repeats a few drawn values in random order. In half of the columns, at least one row in ten is null.
    """
    shuffled = random.Random(draw(st.integers(0, 2**32)))
    rows = shuffled.choice([shuffled.randint(0, 3), *(shuffled.randint(20, max_rows) for _ in range(9))])
    found = {}
    for name, family in families.items():
        kind = shuffled.choice(_ALL_FAMILIES[family])
        pool = draw(st.lists(kind.values, min_size=1 if shuffled.random() < 0.1 else 5, max_size=12))
        if shuffled.random() < 0.5:
            pool.append(None)
        found[name] = Column(kind, [shuffled.choice(pool) for _ in range(rows)])
    return Table(found, rows)


@st.composite
def pairs_of_tables(draw: Any, family: str) -> tuple[Table, Table]:
    """Draw two tables whose keys "k" can be compared."""
    one = draw(tables({"k": family, "payload": "any"}, max_rows=50))
    other = draw(tables({"k": one.columns["k"].kind.family, "payload": "any"}, max_rows=30))
    columns = dict(other.columns)
    if draw(st.booleans()):
        # Else few keys are in both tables.
        kind, pool = one.columns["k"].kind, one.columns["k"].values or [None]
        columns["k"] = Column(kind, [pool[row % len(pool)] for row in range(other.rows)])
    return one, Table(columns, other.rows)
