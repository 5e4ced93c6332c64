"""Chunks, which are the lists of records or Arrow tables that a task processes.

A record is any Python object that the user's functions return. Rows of tables are dicts. A list of dicts becomes a
table with a column per key. A list of other objects becomes a table with one column, `value`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from manyhands.errors import DataError, InvariantError
from manyhands.prepare.records.pickling import pickle_any
from manyhands.prepare.records.unfit import Unfit

if TYPE_CHECKING:
    import pyarrow as pa

Chunk: TypeAlias = "list[Any] | pa.Table"

# The size of a chunk of text. It is large enough that calls cost little per record, and small enough that the parsed
# records fit in a CPU's cache.
CHUNK_BYTES = 2**19

TABLE_CHUNK_BYTES = 2**22  # the size of a chunk that is a table

# Packed values start with one of these prefixes. The prefix for tables is padded, because Arrow needs buffers aligned
# to 8 bytes.
_TABLE, _PICKLE = b"A" + bytes(15), b"P"


def is_table(chunk: Chunk) -> bool:
    """Return True if the chunk is an Arrow table, not a list."""
    return not isinstance(chunk, list)


def num_records(chunk: Chunk) -> int:
    """Return the number of records in the chunk."""
    return len(chunk) if isinstance(chunk, list) else int(chunk.num_rows)


def records_of(chunk: Chunk) -> list[Any]:
    """Return the records as Python objects. Rows of a table become dicts."""
    if isinstance(chunk, list):
        return chunk
    from manyhands.prepare.records.columns import rows_of

    return rows_of(chunk)


def part_of(chunk: Chunk, start: int, stop: int) -> Chunk:
    """Return records `start` to `stop` of the chunk."""
    return chunk[start:stop] if isinstance(chunk, list) else chunk.slice(start, stop - start)


class BadColumn(DataError):
    """The error for records whose values a column can't hold. index: the first such record in the chunk, or None if
    unknown.
    """

    index: int | None = None


def table_of(chunk: Chunk, schema: pa.Schema | None = None) -> pa.Table:
    """Return the records as an Arrow table, with the columns of all records or of `schema`. Missing values are null.

    Values do not change, except that floats may be rounded to floats of fewer bits.
    Raises BadColumn if the values of a column have no common Arrow type, or if `schema` lacks a column of the records.
    """
    import pyarrow as pa

    from manyhands.prepare.records.schemas import conformed

    try:
        if not isinstance(chunk, list):
            return chunk if schema is None else conformed(_checked(chunk, schema), schema)
        columns = _columns(chunk)
        if schema is None:
            return pa.table({name: _array_of(name, values, None) for name, values in columns.items()})
        _check_names(list(columns), schema)
        missing = [None] * len(chunk)
        arrays = [_array_of(field.name, columns.get(field.name, missing), field.type) for field in schema]
        return pa.Table.from_arrays(arrays, schema=schema)
    except (pa.ArrowException, ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, DataError):
            raise
        index = error.index if isinstance(error, Unfit) else None
        record = (
            f"the first of {num_records(chunk)}" if index is None else f"record {index + 1} of {num_records(chunk)}"
        )
        bad = BadColumn(
            f"the records can't be put into columns: {error}",
            got=f"{record}: {_shown(chunk, index or 0)[:200]}",
            hint="use values of one type in a column, or set the types with write(schema=...)",
        )
        bad.index = index
        raise bad from error


def _array_of(name: str, values: list[Any], kind: pa.DataType | None) -> pa.Array:
    import pyarrow as pa

    from manyhands.prepare.records.columns import array_of, first_failing

    try:
        return array_of(values, kind)
    except (pa.ArrowException, ValueError, TypeError, ArithmeticError) as error:
        raise Unfit(name, error, first_failing(len(values), lambda count: array_of(values[:count], kind))) from error


def _shown(chunk: Chunk, index: int) -> str:
    from manyhands.prepare.records.columns import shown

    return repr(chunk[index]) if isinstance(chunk, list) else shown(chunk, index)


def shown_record(chunk: Chunk) -> Any:
    """Return the only record of a chunk for messages, as text if a value of the table's row has no Python form."""
    try:
        return records_of(chunk)[0]
    except DataError:
        return _shown(chunk, 0)


def _columns(records: list[Any]) -> dict[str, list[Any]]:
    if not records or not all(isinstance(record, dict) for record in records):
        return {"value": records}
    names = dict.fromkeys(chain.from_iterable(records))
    if not names or len(set(map(str, names))) < len(names):
        raise ValueError("they have no columns" if not names else "the names of two columns are equal as text")
    return {str(name): [record.get(name) for record in records] for name in names}


def _checked(table: pa.Table, schema: pa.Schema) -> pa.Table:
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError("two columns have the same name")
    _check_names(table.column_names, schema)
    return table


def _check_names(names: Sequence[str], schema: pa.Schema) -> None:
    """Raise DataError if `names` has names that the schema lacks, because their values would be lost."""
    known = set(schema.names)  # pyarrow creates a new list at each access
    extra = [name for name in names if name not in known]
    if extra:
        raise DataError(
            f"column {extra[0]!r} of the records isn't in the schema",
            expected=", ".join(schema.names),
            got=", ".join(names),
            hint="add the column to the schema, or remove it from the records; nothing is dropped silently",
        )


def concatenate(chunks: Sequence[Chunk]) -> Chunk:
    """Return all records in order, as a table if all chunks are tables with the same schema, and otherwise as a
    list.
    """
    if len(chunks) == 1:
        return chunks[0]
    tables = [chunk for chunk in chunks if not isinstance(chunk, list)]
    if tables and len(tables) == len(chunks) and all(t.schema.equals(tables[0].schema) for t in tables):
        import pyarrow as pa

        return pa.concat_tables(tables)
    return list(chain.from_iterable(map(records_of, chunks)))


def with_contiguous_columns(chunk: Chunk) -> Chunk:
    """Return the same records, with each column of a table in one array, so that functions can't observe the column's
    parts.
    """
    return chunk if isinstance(chunk, list) else chunk.combine_chunks()


def size_bytes(chunk: Chunk) -> int:
    """Return an estimate of the memory of the records. It depends only on their values, so plans may depend on it."""
    if not isinstance(chunk, list):
        return sum(sum(map(_array_bytes, column.chunks)) for column in chunk.columns)
    # Measure only every n-th record to save time. The positions are fixed, so that the estimate is reproducible.
    sampled = chunk[:: max(1, len(chunk) // 64)]
    return sum(map(_value_bytes, sampled)) * len(chunk) // len(sampled) if sampled else 0


def _array_bytes(array: pa.Array) -> int:
    """Return the size of the values without null bitmaps, because slicing may add or remove these."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_boolean(kind):
        return len(array)
    if pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_fixed_size_binary(kind):
        return len(array) * int(kind.bit_width) // 8
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 4 * len(array) + _array_bytes(array.flatten())
    if pa.types.is_struct(kind):
        return sum(map(_array_bytes, array.flatten()))
    if isinstance(array, pa.FixedShapeTensorArray):
        return len(array) * int(math.prod(kind.shape)) * max(1, int(kind.value_type.bit_width) // 8)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        ends = memoryview(array.buffers()[1]).cast("i")
        return 4 * len(array) + ends[array.offset + len(array)] - ends[array.offset] if len(array) else 0
    return int(array.nbytes)


def _value_bytes(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value) + 8
    if isinstance(value, dict):
        return 16 + sum(_value_bytes(key) + _value_bytes(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return 16 + sum(map(_value_bytes, value))
    if isinstance(value, np.ndarray):
        return 16 + int(value.nbytes)
    return 8


def share_equal_texts(records: list[Any]) -> list[Any]:
    """Return the same records.

    If many strings are equal, replace equal strings by one object, which pickle stores once.
    """
    sampled = records[:: max(1, len(records) // 1024)]
    if set(map(type, sampled)) != {str} or 2 * len(set(sampled)) > len(sampled) or set(map(type, records)) != {str}:
        return records
    once: dict[str, str] = {}
    return list(map(once.setdefault, records, records))


def pack(value: Any) -> bytes | memoryview:
    """Return a value as bytes: an Arrow table in Arrow's stream format, and any other value as a pickle.

    Raises DataError for a value that can't be pickled.
    """
    if type(value).__module__.startswith("pyarrow"):
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        sink.write(_TABLE)
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        return memoryview(sink.getvalue())
    try:
        return _PICKLE + pickle.dumps(value, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):  # pickle can't import classes of the user's script
        try:
            return _PICKLE + pickle_any(value)
        except Exception as error:
            raise DataError(
                f"records can't be serialized: {type(error).__name__}: {error}",
                hint="use records of numbers, text and bytes, and dicts, lists and tuples of these",
            ) from error


def unpack(packed: bytes | memoryview) -> Any:
    """Return the value that `pack` received. Raises InvariantError for bytes that `pack` did not write."""
    if packed[:1] == _TABLE[:1]:
        import pyarrow as pa

        return pa.ipc.open_stream(pa.py_buffer(memoryview(packed)[len(_TABLE) :])).read_all()
    if packed[:1] != _PICKLE:
        raise InvariantError("packed values start with an unknown byte", got=packed[:1])
    return pickle.loads(memoryview(packed)[1:])
