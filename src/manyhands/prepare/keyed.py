"""Records with keys: what is put in order, written in runs and cut into ranges.

A *cut* lies between keys: `(key, 0)` before all records with that key, `(key, 1)` behind them. A range is
`[start, stop)` of cuts, None where it is open.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from manyhands.errors import DataError
from manyhands.prepare.chunks import Chunk, concatenate, size_bytes

if TYPE_CHECKING:
    import pyarrow as pa

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
        from manyhands.prepare.table_order import order_of

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
