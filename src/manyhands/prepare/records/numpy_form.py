"""Converts the columns of a table to NumPy arrays with the same values, and back.

NumPy's arrays have no nulls. Arrow converts integers with nulls to floats, which changes integers beyond 2**53. A
column whose values NumPy can't hold is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.errors import DataError
from manyhands.numerics.exact_sums import WHOLE

if TYPE_CHECKING:
    import pyarrow as pa

_CURE = "fill or drop the nulls first, or use form='arrow'"


def numpy_columns(table: pa.Table) -> dict[str, Any]:
    """Return the columns as NumPy arrays.

    Numbers and truth values without nulls keep their types. Integers with nulls become floats, and nulls in columns of
    floats become NaN. Time stamps become `datetime64`, in UTC if they have a zone, with NaT for nulls. A column of
    arrays becomes one array [rows, ...]; with nulls it is a masked array. All other columns become arrays of objects,
    with None for nulls. Raises DataError if this would change a value.
    """
    return {name: _numpy_column(name, table.column(name)) for name in table.column_names}


def _numpy_column(name: str, column: pa.ChunkedArray) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    from manyhands.prepare.records.array_columns import is_tensor, stack_of

    try:
        if is_tensor(column.type):
            return stack_of(column)
        if pa.types.is_run_end_encoded(column.type):
            column = pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], column.type.value_type)
        if pa.types.is_dictionary(column.type):  # Arrow would replace nulls by other values of the dictionary
            column = column.cast(column.type.value_type)
        if column.num_chunks > 1:  # a null in one chunk would convert the values of all chunks
            column = pa.chunked_array([column.combine_chunks()])
        for leaf in (leaf for chunk in column.chunks for leaf in _leaves(chunk)):
            _check_leaf(name, leaf)
        return column.to_numpy()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise _not_exact(name, column.type, str(error), "use form='arrow', or drop the column") from error


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    """Yield the array, or the arrays of values inside lists, structs and maps."""
    import pyarrow as pa

    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        yield from _leaves(array.storage)
    elif pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            yield from _leaves(array.field(number))
    elif pa.types.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif pa.types.is_nested(kind) and hasattr(array, "flatten"):
        yield from _leaves(array.flatten())
    elif pa.types.is_dictionary(kind):
        yield from _leaves(array.dictionary_decode())
    else:
        yield array


def _check_leaf(name: str, array: pa.Array) -> None:
    """Raise DataError if Arrow's conversion to NumPy would change a value of the array."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_interval(kind):  # pyarrow 26 crashes for this type
        raise _not_exact(name, kind, "NumPy has no such type", "use form='arrow', or drop the column")
    if not pa.types.is_integer(kind) or not array.null_count:
        return
    values = array.drop_null().to_numpy(zero_copy_only=False)
    for value in values[(values > WHOLE) | (values < -WHOLE if values.dtype.kind == "i" else False)].tolist():
        if int(float(value)) != value:
            raise _not_exact(name, kind, f"{value} beside a null, which becomes a float", _CURE)


def _not_exact(name: str, kind: Any, got: str, hint: str) -> DataError:
    return DataError(
        f"column {name!r} can't be passed as NumPy arrays without changing values",
        expected=f"values of type {kind} that NumPy can hold",
        got=got,
        hint=hint,
    )


def table_of_columns(columns: Mapping[str, Any]) -> pa.Table:
    """Convert columns (NumPy arrays, masked arrays, lists, Arrow arrays) to a table.

    Raises DataError for a column of objects that Arrow would convert to other values.
    """
    import pyarrow as pa

    return pa.table({name: _arrow_column(name, column) for name, column in columns.items()})


def _arrow_column(name: str, column: Any) -> Any:
    import pyarrow as pa

    from manyhands.prepare.records.array_columns import tensors_of_stack, with_short_days
    from manyhands.prepare.records.columns import array_of, lists_of

    is_array = isinstance(column, np.ndarray)
    is_objects = is_array and column.dtype == object and column.ndim == 1
    try:
        if is_objects and all(getattr(value, "ndim", 1) == 1 for value in column):
            return lists_of(list(column))  # `numpy_columns` returns lists as such a column
        if is_objects or isinstance(column, (list, tuple)):
            return array_of(list(column))
        if is_array and column.ndim > 1:
            return tensors_of_stack(column)
        if is_array and not column.dtype.isnative:
            return column.astype(column.dtype.newbyteorder("="))
        return with_short_days(column) if type(column) is np.ndarray else column
    except (pa.ArrowException, ValueError, TypeError, ArithmeticError) as error:
        reason = f"{error}, in column {name!r}"
        raise DataError(
            f"the records can't be put into columns: {reason}",
            got=str(column[:3])[:200],
            hint="return values of one type in a column",
        ) from error
