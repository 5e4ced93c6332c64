"""Keys of records, and records with keys.

A record's key: the record itself, columns of it, or what a function makes of it.

Records with keys: what is put in order, written in runs and cut into ranges.
A *cut* lies between keys: `(key, 0)` before all records with that key, `(key, 1)` behind them. A range is
`[start, stop)` of cuts, None where it is open.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import orjson

from manyhands.errors import DataError
from manyhands.prepare.records.chunks import Chunk, concatenate, records_of, size_bytes
from manyhands.prepare.records.operations import name_of
from manyhands.prepare.records.pipeline import BadKey

if TYPE_CHECKING:
    import pyarrow as pa

Key: TypeAlias = "Callable[[Any], Any] | tuple[str, ...] | None"

KeyLike: TypeAlias = "Callable[[Any], Any] | str | Sequence[str] | None"  # as users give it


def keys_of(chunk: Chunk, key: Key) -> list[Any]:
    """The keys of a chunk's records; of several columns, tuples. Raises BadKey for a column that isn't there."""
    records = records_of(chunk)
    if key is None:
        return records
    if not isinstance(key, tuple):
        return list(map(key, records))
    try:
        return list(map(itemgetter(*key), records))
    except KeyError as error:
        raise BadKey(f"the record has no column {error}") from error
    except TypeError as error:
        raise BadKey(f"the record has no columns: it is a {type(records[0]).__name__}, not a dict") from error


def values_of(records: list[Any], of: Callable[[Any], Any] | str | None) -> list[Any]:
    """What is aggregated of each record. Raises BadKey for a column that isn't there."""
    if of is None:
        return records
    return keys_of(records, (of,) if isinstance(of, str) else of)


def check_keys(keys: list[Any]) -> None:
    """Raise BadKey if a key has no place in an order: None, NaN, or a tuple with one of them."""
    kinds = set(map(type, keys))
    if kinds <= {str, int, bytes, bool}:
        return
    for key in keys:
        for part in key if isinstance(key, tuple) else (key,):
            if part is None:
                raise BadKey("the key is None: leave such records out, or give them a key of their own")
            if part != part:
                raise BadKey("the key is NaN, which equals nothing: leave such records out, or give them another key")


def content_key(record: Any) -> bytes:
    """16 bytes that stand for a whole record, whatever the order of its columns. Raises BadKey for what isn't plain."""
    text = isinstance(record, str)
    data = b"s" + record.encode("utf-8", "surrogatepass") if text else b"j" + _canonical(record)
    return hashlib.blake2b(data, digest_size=16).digest()


def _canonical(record: Any) -> bytes:
    try:
        made = orjson.dumps(record, _tagged, orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
        if b"null" in made:  # which stands for None, and for floats that JSON doesn't have
            made = orjson.dumps(_finite(record), _tagged, orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
        return made
    except TypeError as error:
        raise BadKey(
            f"a {type(record).__name__} can't be told from others by its content ({error}): use distinct(key=...)"
        ) from error


def _finite(value: Any) -> Any:
    """The same, with NaN and infinities as what equals nothing else."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"\0float": repr(value)}
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tagged(value: Any) -> Any:
    """For what JSON doesn't have: its type's name beside it, so that it equals nothing else."""
    if isinstance(value, (bytes, bytearray)):
        return {"\0bytes": value.hex()}
    if isinstance(value, (set, frozenset)):
        return {"\0set": sorted(orjson.dumps(item, _tagged).decode() for item in value)}
    if isinstance(value, int) or type(value).__module__ in ("datetime", "decimal", "uuid"):
        return {f"\0{type(value).__name__}": repr(value)}
    raise TypeError(f"type {type(value).__name__} has no canonical form")


def key_from(key: KeyLike) -> Key:
    """The key that a user has given."""
    if key is None or callable(key):
        return key
    return (key,) if isinstance(key, str) else tuple(key)


def columns_of(key: Key) -> tuple[str, ...]:
    """The columns that a key is made of; none if it is a function's, or the record."""
    return key if isinstance(key, tuple) else ()


def as_function(key: Key) -> Key:
    """As a function: operator.itemgetter gives what a key of these columns is."""
    return itemgetter(*key) if isinstance(key, tuple) else key


def key_name(key: KeyLike) -> str:
    """For messages and plans."""
    if key is None:
        return "the record"
    if callable(key):
        return name_of(key)
    return key if isinstance(key, str) else ", ".join(key)


Cut: TypeAlias = tuple[Any, int]

ORDER_COLUMN = "manyhands order"  # a key that isn't the records' own

T = TypeVar("T")


@dataclass(frozen=True)
class KeyedLists:
    """Keys, and columns of values as long as them. A list of records is the only column, and may be the keys, too."""

    keys: list[Any]
    columns: list[list[Any]]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def chunk(self) -> Chunk:
        """The records."""
        return self.columns[0]

    def key_at(self, index: int) -> Any:
        """The key of a record."""
        return self.keys[index]

    def part(self, start: int, stop: int) -> KeyedLists:
        """Records `start` to `stop`."""
        keys = self.keys[start:stop]
        return KeyedLists(keys, [keys if c is self.keys else c[start:stop] for c in self.columns])

    def below(self, cut: Cut) -> int:
        """How many records are before the cut. The keys are in order."""
        key, behind = cut
        return with_one_order(lambda: (bisect_right if behind else bisect_left)(self.keys, key))

    def in_order(self, *, descending: bool = False) -> KeyedLists:
        """By keys; equal ones stay as they are. Raises DataError for keys that have no order."""
        keys = self.keys
        if all(column is keys for column in self.columns):
            keys = with_one_order(lambda: sorted(keys, reverse=descending))
            return KeyedLists(keys, [keys for _ in self.columns])
        order = with_one_order(lambda: sorted(range(len(keys)), key=keys.__getitem__, reverse=descending))
        if len(order) < 2:
            return self
        take = itemgetter(*order)
        return KeyedLists(list(take(keys)), [list(take(column)) for column in self.columns])

    def size_bytes(self) -> int:
        """About how much memory they take."""
        return sum(map(size_bytes, [column for column in self.columns if column is not self.keys] + [self.keys]))


@dataclass(frozen=True)
class KeyedTable:
    """A table, and the names of the columns that are its key."""

    table: pa.Table
    by: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def chunk(self) -> Chunk:
        """The records."""
        return self.table

    def key_at(self, index: int) -> Any:
        """The key of a row: its value, or a tuple for several columns."""
        values = tuple(self.table.column(name)[index].as_py() for name in self.by)
        return values[0] if len(values) == 1 else values

    def part(self, start: int, stop: int) -> KeyedTable:
        """Rows `start` to `stop`."""
        return KeyedTable(self.table.slice(start, stop - start), self.by)

    def below(self, cut: Cut) -> int:
        """How many rows are before the cut. The keys are in order."""
        key, behind = cut
        view = _Keys(self)
        return with_one_order(lambda: (bisect_right if behind else bisect_left)(view, key))

    def in_order(self, *, descending: bool = False) -> KeyedTable:
        """By keys; equal ones stay as they are."""
        from manyhands.prepare.records.table_order import order_of

        return KeyedTable(self.table.take(order_of(self.table, self.by, descending=descending)), self.by)

    def size_bytes(self) -> int:
        """How much memory the columns take."""
        return size_bytes(self.table)

    def as_lists(self) -> KeyedLists:
        """The same as Python objects."""
        columns = [self.table.column(name).to_pylist() for name in self.by]
        keys = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        own = self.table.drop_columns([ORDER_COLUMN]) if self.by == (ORDER_COLUMN,) else self.table
        return KeyedLists(keys, [own.to_pylist()])


class _Keys(Sequence[Any]):
    """A table's keys, made when they are looked at."""

    def __init__(self, keyed: KeyedTable) -> None:
        self._keyed = keyed

    def __len__(self) -> int:
        return len(self._keyed)

    def __getitem__(self, index: Any) -> Any:
        return self._keyed.key_at(index)


Keyed: TypeAlias = KeyedLists | KeyedTable


def joined(parts: Sequence[Keyed]) -> Keyed:
    """All of them in a row. `parts` has at least one."""
    if len(parts) == 1:
        return parts[0]
    tables = [part for part in parts if isinstance(part, KeyedTable)]
    if len(tables) == len(parts) and all(t.table.schema.equals(tables[0].table.schema) for t in tables):
        table: Any = concatenate([part.table for part in tables])
        return KeyedTable(table, tables[0].by)
    lists = [part.as_lists() if isinstance(part, KeyedTable) else part for part in parts]
    keys = list(chain.from_iterable(part.keys for part in lists))
    alike = all(part.columns[0] is part.keys for part in lists)
    columns = zip(*(part.columns for part in lists), strict=True)
    return KeyedLists(keys, [keys] if alike else [list(chain.from_iterable(column)) for column in columns])


def with_one_order(compare: Callable[[], T]) -> T:
    """`compare()`; a comparison that Python refuses becomes a DataError."""
    try:
        return compare()
    except TypeError as error:
        raise DataError(
            f"keys of different types can't be put in order: {error}",
            expected="keys of one type: numbers, text, bytes, or tuples of them",
            hint="let the key function return one type: key=lambda record: str(...), say",
        ) from error
