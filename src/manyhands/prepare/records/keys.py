"""Keys of records, and records with their keys.

The key of a record is the record itself, one or more of its columns, or the result of a function. Records with keys
are sorted, written as runs, and divided into ranges.

A *cut* is a boundary between keys: `(key, 0)` lies before all records with that key, and `(key, 1)` lies after them. A
range is `[start, stop)` of cuts, where None means that this side is unbounded. Keys are compared only by `<`, in the
order of `key_order`.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import orjson

from manyhands.prepare.records.chunks import Chunk, concatenate, records_of, size_bytes
from manyhands.prepare.records.functions import check_results, name_of
from manyhands.prepare.records.key_order import (
    are_built_in,
    check_order,
    compare_keys,
    compared,
    compared_key,
    shown_keys,
)
from manyhands.prepare.records.pipeline import BadKey

if TYPE_CHECKING:
    import pyarrow as pa

Key: TypeAlias = "Callable[[Any], Any] | tuple[str, ...] | None"

KeyLike: TypeAlias = "Callable[[Any], Any] | str | Sequence[str] | None"  # a key as users pass it


def keys_of(chunk: Chunk, key: Key) -> list[Any]:
    """Return the keys of a chunk's records, as tuples for several columns. Raises BadKey for a missing column."""
    if not isinstance(chunk, list) and isinstance(key, tuple) and set(key) <= set(chunk.column_names):
        chunk = chunk.select(list(dict.fromkeys(key)))  # Python values are needed only for these columns
    records = records_of(chunk)
    if key is None:
        return records
    # Don't use `map`, which would mistake a StopIteration that a function raises for the end of the records.
    if not isinstance(key, tuple):
        keys = [key(record) for record in records]
        check_results(keys, key, is_read=True)
        return keys
    columns = itemgetter(*key)
    try:
        return [columns(record) for record in records]
    except KeyError as error:
        raise BadKey(f"the record has no column {error}") from error
    except TypeError as error:
        raise BadKey(f"the record has no columns: it is a {type(records[0]).__name__}, not a dict") from error


def values_of(records: list[Any], of: Callable[[Any], Any] | str | None) -> list[Any]:
    """Return the values to aggregate, one per record. Raises BadKey for a missing column."""
    if of is None:
        return records
    return keys_of(records, (of,) if isinstance(of, str) else of)


def content_key(record: Any) -> bytes:
    """Return a 16-byte hash of a record's content, independent of the order of its columns.

    Raises BadKey for an object that has no canonical form.
    """
    is_text = isinstance(record, str)
    data = b"s" + record.encode("utf-8", "surrogatepass") if is_text else b"j" + _canonical_json(record)
    return hashlib.blake2b(data, digest_size=16).digest()


def _canonical_json(record: Any) -> bytes:
    try:
        encoded = orjson.dumps(record, _tagged, orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
        if b"null" in encoded:  # orjson writes null for None, and also for NaN and infinities
            encoded = orjson.dumps(
                _tag_non_finite(record), _tagged, orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME
            )
        return encoded
    except TypeError as error:
        raise BadKey(
            f"a {type(record).__name__} can't be compared by its content ({error}): use distinct(key=...)"
        ) from error


def _tag_non_finite(value: Any) -> Any:
    """Return the value with NaN and infinities replaced by objects that are not equal to any other value."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"\0float": repr(value)}
    if isinstance(value, dict):
        return {key: _tag_non_finite(item) for key, item in value.items()}
    return [_tag_non_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tagged(value: Any) -> Any:
    """Return a JSON form of a value that JSON lacks, tagged with its type so that it is not equal to any other value.

    Raises TypeError for types without a canonical form.
    """
    if isinstance(value, (bytes, bytearray)):
        return {"\0bytes": value.hex()}
    if isinstance(value, (set, frozenset)):
        return {"\0set": sorted(orjson.dumps(item, _tagged).decode() for item in value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufMm":
        plain = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        digest = hashlib.blake2b(plain.tobytes(), digest_size=16).hexdigest()
        return {"\0array": [str(plain.dtype), list(value.shape), digest]}
    if isinstance(value, int) or type(value).__module__ in ("datetime", "decimal", "uuid"):
        return {f"\0{type(value).__name__}": repr(value)}
    raise TypeError(f"type {type(value).__name__} has no canonical form")


def key_from(key: KeyLike) -> Key:
    """Convert a key as users pass it to its internal form."""
    if key is None or callable(key):
        return key
    return (key,) if isinstance(key, str) else tuple(key)


def columns_of(key: Key) -> tuple[str, ...]:
    """Return the columns of a key, or an empty tuple if the key is a function or the record itself."""
    return key if isinstance(key, tuple) else ()


def as_function(key: Key) -> Key:
    """Return a key of columns as a function. `operator.itemgetter` returns the same keys as the columns have."""
    return itemgetter(*key) if isinstance(key, tuple) else key


def key_name(key: KeyLike) -> str:
    """Return the name of a key for messages and plans."""
    if key is None:
        return "the record"
    if callable(key):
        return name_of(key)
    return key if isinstance(key, str) else ", ".join(key)


Cut: TypeAlias = tuple[Any, int]

ORDER_COLUMN = "manyhands order"  # an extra column that holds the order, and is dropped after the shuffle


def is_before(key: Any, cut: Cut) -> bool:
    """Return True if records with this key lie before the cut."""
    at, is_after = cut
    return not at < key if is_after else bool(key < at)


def cut_is_less(cut: Cut, other: Cut) -> bool:
    """Return True if the first cut lies before the second cut."""
    if cut[0] < other[0]:
        return True
    return not other[0] < cut[0] and cut[1] < other[1]


@dataclass(frozen=True)
class KeyedLists:
    """Keys and columns of values, all of the same length.

    The records form one column, which may be the list of keys itself.
    """

    keys: list[Any]
    columns: list[list[Any]]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def chunk(self) -> Chunk:
        """Return the records."""
        return self.columns[0]

    def key_at(self, index: int) -> Any:
        """Return the key of a record, in the form in which it is compared."""
        return compared_key(self.keys[index])

    def part(self, start: int, stop: int) -> KeyedLists:
        """Return records `start` to `stop`."""
        keys = self.keys[start:stop]
        # If a column and the keys are the same list, they must also be the same list in the result.
        columns = [keys if column is self.keys else column[start:stop] for column in self.columns]
        return KeyedLists(keys, columns)

    def count_before(self, cut: Cut) -> int:
        """Return the number of records before the cut. The keys must be sorted."""
        key, is_after = cut
        return compare_keys(lambda: (bisect_right if is_after else bisect_left)(self.keys, key, key=compared_key))

    def are_within(self, start: Cut | None, stop: Cut | None) -> bool:
        """Return True if all keys are in the range. The keys must be sorted."""
        keys = compared(self.keys)
        if are_built_in(keys):
            keys = [*keys[:1], *keys[-1:]]  # with a total order, all other keys lie between these two
        return all(
            (start is None or not is_before(key, start)) and (stop is None or is_before(key, stop)) for key in keys
        )

    def in_order(self, *, descending: bool = False) -> KeyedLists:
        """Return the records sorted by key. The sort is stable.

        Raises DataError for keys that can't be compared or have no total order.
        """
        keys = compared(self.keys)
        if all(column is keys for column in self.columns):
            keys = compare_keys(lambda: sorted(keys, reverse=descending))
            check_order(keys, descending=descending)
            return KeyedLists(keys, [keys for _ in self.columns])
        order = compare_keys(lambda: sorted(range(len(keys)), key=keys.__getitem__, reverse=descending))
        if len(order) < 2:  # itemgetter of one index returns the item, not a tuple
            return self
        take = itemgetter(*order)
        check_order(list(take(keys)), descending=descending)
        sorted_keys = list(take(self.keys))
        return KeyedLists(
            sorted_keys, [sorted_keys if column is self.keys else list(take(column)) for column in self.columns]
        )

    def size_bytes(self) -> int:
        """Return an estimate of the memory of keys and columns."""
        keys = shown_keys(self.keys)  # the size must not depend on the form in which keys are compared
        return sum(map(size_bytes, [column for column in self.columns if column is not self.keys] + [keys]))


@dataclass(frozen=True)
class KeyedTable:
    """A table, and the names of its key columns. is_sorted: True if its rows are known to be sorted by key."""

    table: pa.Table
    by: tuple[str, ...]
    is_sorted: bool = False

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def chunk(self) -> Chunk:
        """Return the records."""
        return self.table

    def key_at(self, index: int) -> Any:
        """Return the key of a row, in the form in which it is compared: a value, or a tuple for several columns."""
        from manyhands.prepare.records.key_columns import key_at

        return key_at([self.table.column(name) for name in self.by], index)

    def part(self, start: int, stop: int) -> KeyedTable:
        """Return rows `start` to `stop`."""
        return KeyedTable(self.table.slice(start, stop - start), self.by)

    def count_before(self, cut: Cut) -> int:
        """Return the number of rows before the cut. The keys must be sorted."""
        key, is_after = cut
        view = _Keys(self)
        return compare_keys(lambda: (bisect_right if is_after else bisect_left)(view, key))

    def are_within(self, start: Cut | None, stop: Cut | None) -> bool:
        """Return True if all keys are in the range. The keys must be sorted."""
        ends = {0, len(self) - 1} if len(self) else ()
        return KeyedLists([self.key_at(index) for index in ends], []).are_within(start, stop)

    def in_order(self, *, descending: bool = False) -> KeyedTable:
        """Return the rows sorted by key. The sort is stable."""
        from manyhands.prepare.records.table_order import in_order

        return KeyedTable(in_order(self.table, self.by, descending=descending), self.by)

    def size_bytes(self) -> int:
        """Return an estimate of the memory of the columns."""
        return size_bytes(self.table)

    def as_lists(self) -> KeyedLists:
        """Return keys and rows as Python objects."""
        from manyhands.prepare.records.key_columns import keys_of_columns

        keys = keys_of_columns([self.table.column(name) for name in self.by])
        records = self.table.drop_columns([ORDER_COLUMN]) if self.by == (ORDER_COLUMN,) else self.table
        return KeyedLists(keys, [records_of(records)])


class _Keys(Sequence[Any]):
    """A sequence view of a table's keys. It converts only the keys that a binary search inspects."""

    def __init__(self, keyed: KeyedTable) -> None:
        self._keyed = keyed

    def __len__(self) -> int:
        return len(self._keyed)

    def __getitem__(self, index: Any) -> Any:
        return self._keyed.key_at(index)


Keyed: TypeAlias = KeyedLists | KeyedTable


def concatenate_keyed(parts: Sequence[Keyed]) -> Keyed:
    """Concatenate one or more parts. The result is a table if all parts are tables with the same schema."""
    if len(parts) == 1:
        return parts[0]
    tables = [part for part in parts if isinstance(part, KeyedTable)]
    if len(tables) == len(parts) and all(t.table.schema.equals(tables[0].table.schema) for t in tables):
        table: Any = concatenate([part.table for part in tables])
        return KeyedTable(table, tables[0].by)
    lists = [part.as_lists() if isinstance(part, KeyedTable) else part for part in parts]
    keys = list(chain.from_iterable(part.keys for part in lists))
    records_are_keys = all(part.columns[0] is part.keys for part in lists)
    columns = zip(*(part.columns for part in lists), strict=True)
    return KeyedLists(keys, [keys] if records_are_keys else [list(chain.from_iterable(column)) for column in columns])
