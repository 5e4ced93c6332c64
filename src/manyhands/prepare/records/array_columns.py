"""Converts columns of NumPy arrays to Arrow's fixed-shape tensors and back, without changing a bit.

All arrays of a column have one type and one shape, so that a column of records is one block of memory. pyarrow returns
the values of a tensor as a flat list, and cannot convert tensors of booleans, so this file reads their buffers itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from manyhands.prepare.records.unfit import Unfit

_NUMBERS = "booleans, integers, floats, datetimes or time differences of NumPy"


def is_tensor(kind: Any) -> bool:
    """Return True if an Arrow type is a fixed-shape tensor, which holds an array in each row."""
    return isinstance(kind, pa.FixedShapeTensorType)


def is_array_column(values: Sequence[Any]) -> bool:
    """Return True if one of the values is an array that a tensor holds.

    Arrays of one dimension with text or objects are treated as lists.
    """
    if not any(issubclass(kind, np.ndarray) for kind in set(map(type, values))):
        return False
    return any(isinstance(value, np.ndarray) and not _is_list(value) for value in values)


def _is_list(array: Any) -> bool:
    return array.ndim == 1 and array.dtype.kind in "OUS"


def element_type(dtype: np.dtype[Any]) -> pa.DataType:
    """Return the Arrow type of an array's elements. Raises ValueError for a type whose elements Arrow can't hold."""
    if dtype.kind in "biuf" or (dtype.kind in "mM" and np.datetime_data(dtype)[1] == 1):
        try:
            return pa.from_numpy_dtype(dtype)
        except pa.ArrowNotImplementedError:
            pass  # such as long doubles, and times in hours; Arrow would read times in units of 2 s as seconds
    cure = "use two arrays, or .view of floats" if dtype.kind == "c" else "use one column for each field"
    hint = f": {cure}" if dtype.kind in "cV" else ""
    raise ValueError(f"it has an array of type {dtype}, and arrays of records hold {_NUMBERS}{hint}")


def tensor_type(dtype: np.dtype[Any], shape: Sequence[int]) -> pa.DataType:
    """Return the Arrow type of arrays of this type and shape. Raises ValueError as `element_type` does."""
    return pa.fixed_shape_tensor(element_type(dtype), list(shape))


def shape_of(kind: Any) -> tuple[int, ...]:
    """Return the shape of the arrays in a column of this type."""
    if kind.permutation is None:
        return tuple(kind.shape)
    return tuple(kind.shape[axis] for axis in kind.permutation)


def plain_tensor(kind: Any) -> pa.DataType:
    """Return the type of the same arrays in C order, without names of dimensions."""
    return pa.fixed_shape_tensor(kind.value_type, list(shape_of(kind)))


def common_tensor(one: Any, other: Any) -> Any:
    """Return a type for the arrays of both types, or None if their elements or shapes differ."""
    if not (is_tensor(one) and is_tensor(other)):
        return None
    plain = plain_tensor(one)
    return plain if plain.equals(plain_tensor(other)) else None


def tensors_of(values: Sequence[Any], kind: Any = None) -> pa.Array:
    """Return arrays as a column. None stays null.

    kind: the type of the column. By default, the first array determines it. Raises ValueError for a value that is not
    an array, or whose type or shape differs.
    """
    given = kind is not None
    first = next((value for value in values if isinstance(value, np.ndarray)), None)
    if kind is None:
        found = _checked(first)
        kind = tensor_type(found.dtype, found.shape)
    shape, dtype = shape_of(kind), dtype_of(kind)
    rows = np.zeros((len(values), *shape), dtype)
    valid = np.ones(len(values), bool)
    for index, value in enumerate(values):
        if value is None:
            valid[index] = False
            continue
        array = _checked(value)
        if array.shape != shape:
            before = "its type is an array of" if given else "the array before it has"
            raise ValueError(f"it has an array of shape {list(array.shape)}, and {before} shape {list(shape)}")
        rows[index] = _converted(array, dtype) if given else _same_type(array, dtype)
    return _tensors(rows, valid, kind)


def _checked(value: Any) -> Any:
    """Return the value if it is an array without missing elements. Raises ValueError."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"it has arrays and a {type(value).__name__}, which have no common type")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError("it has an array with masked elements: fill them, for example with NaN")
    element_type(value.dtype)
    return value


def _same_type(array: Any, dtype: np.dtype[Any]) -> Any:
    if array.dtype.newbyteorder("=") != dtype:
        raise ValueError(f"it has arrays of type {dtype} and {array.dtype.newbyteorder('=')}, which are never mixed")
    return array


def _converted(array: Any, dtype: np.dtype[Any]) -> Any:
    """Convert an array to the type of a given column. Floats may be rounded; no other value may change."""
    if array.dtype.newbyteorder("=") == dtype:
        return array
    if array.dtype.kind not in "iuf" or dtype.kind not in "iuf":
        raise ValueError(f"it has an array of type {array.dtype}, and the elements of its type are {dtype}")
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    if array.dtype.kind == "f" and dtype.kind == "f":
        with np.errstate(all="ignore"):
            found = native.astype(dtype)
        if not np.array_equal(np.isfinite(found), np.isfinite(native)):
            raise ValueError(f"it has an array with numbers that its type {dtype} can't hold")
        return found
    # Arrow refuses a number that would change; NumPy does not.
    exact = pa.array(native.reshape(-1)).cast(element_type(dtype))
    return exact.to_numpy(zero_copy_only=False).reshape(array.shape)


def dtype_of(kind: Any) -> np.dtype[Any]:
    """Return the NumPy type of the arrays in a column of this type. Raises ValueError if NumPy has no such type."""
    value = kind.value_type
    check_elements(value)
    dtype: np.dtype[Any] = pa.array([], value).to_numpy(zero_copy_only=False).dtype
    return dtype


def check_elements(value: Any) -> None:
    """Raise ValueError if arrays can't have elements of this Arrow type."""
    is_held = pat.is_boolean(value) or pat.is_integer(value) or pat.is_floating(value) or pat.is_duration(value)
    if not is_held and not pat.is_date32(value) and not (pat.is_timestamp(value) and value.tz is None):
        raise ValueError(f"it has values of type {value}, and arrays hold {_NUMBERS}")


def tensors_of_stack(stack: Any) -> pa.Array:
    """Return an array [rows, ...] as a column of `rows` arrays. A completely masked row of a masked array is null.

    Raises ValueError for elements that Arrow can't hold, and for a row in which only some elements are masked.
    """
    valid: Any = np.ones(len(stack), bool)
    if isinstance(stack, np.ma.MaskedArray):
        masked = np.ma.getmaskarray(stack).reshape(len(stack), -1)
        valid = ~masked.all(axis=1) if masked.shape[1] else valid
        if masked[valid].any():
            raise ValueError("some elements of an array are masked: mask complete rows, or fill the elements")
        stack = stack.data
    kind = tensor_type(stack.dtype, stack.shape[1:])
    return _tensors(np.ascontiguousarray(stack, stack.dtype.newbyteorder("=")), valid, kind)


def _tensors(rows: Any, valid: Any, kind: Any) -> pa.Array:
    """Return the column of a C-contiguous array [rows, ...] in which only the rows of `valid` are not null."""
    if kind.permutation is not None:
        rows = np.ascontiguousarray(rows.transpose(0, *(1 + np.argsort(kind.permutation))))
    elements = pa.array(with_short_days(rows.reshape(-1)), kind.value_type)
    nulls = None if valid.all() else pa.array(valid).buffers()[1]
    storage = pa.Array.from_buffers(kind.storage_type, len(rows), [nulls], children=[elements])
    return pa.ExtensionArray.from_storage(kind, storage)


def with_short_days(array: Any) -> Any:
    """Return an array of NumPy. Raises ValueError for a date that Arrow's 32 bits would silently change."""
    if array.dtype == "M8[D]":
        days = array.astype(np.int64)
        if (((days < -(2**31)) | (days >= 2**31)) & ~np.isnat(array)).any():
            raise ValueError("it has a date that a column of dates can't hold: its year is beyond 5 million")
    return array


def _stack(column: Any) -> tuple[Any, Any]:
    """Return (rows, valid) of a tensor array: an array [rows, ...], which may be read-only, and False for null rows.

    Raises ValueError for an array with missing elements.
    """
    kind, count = column.type, len(column)
    dtype, size = dtype_of(kind), math.prod(kind.shape)
    storage = column.storage
    elements = storage.values.slice(storage.offset * size, count * size)
    valid = np.ones(count, bool) if not storage.null_count else storage.is_valid().to_numpy(zero_copy_only=False)
    if elements.null_count and dtype.kind not in "Mm":  # NaT is null in Arrow
        missing = elements.is_null().to_numpy(zero_copy_only=False).reshape(count, size)
        if missing[valid].any():
            raise ValueError("it has an array with missing elements (null)")
        elements = elements.fill_null(False if dtype.kind == "b" else 0)
    rows = elements.to_numpy(zero_copy_only=False).reshape(count, *kind.shape)
    if kind.permutation is not None:
        rows = rows.transpose(0, *(1 + axis for axis in kind.permutation))
    return rows, valid


def arrays_of(column: Any) -> list[Any]:
    """Return the rows of a tensor column (Array or ChunkedArray): arrays, which share no memory, and None for nulls.

    Raises ValueError for an array with missing elements.
    """
    found: list[Any] = []
    for part in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        rows, valid = _stack(part)
        found += [np.array(row) if is_valid else None for row, is_valid in zip(rows, valid.tolist(), strict=True)]
    return found


def stack_of(column: pa.ChunkedArray) -> Any:
    """Return a tensor column as one writable array [rows, ...].

    With nulls, the result is a masked array, so that its type and all other rows stay the same. Below the mask are NaN,
    NaT or zeros. Raises ValueError for an array with missing elements.
    """
    if not column.num_chunks:
        return np.empty((0, *shape_of(column.type)), dtype_of(column.type))
    parts = [_stack(part) for part in column.chunks]
    rows = np.concatenate([part for part, _ in parts])
    valid = np.concatenate([part for _, part in parts])
    if valid.all():
        return rows
    rows[~valid] = np.nan if rows.dtype.kind == "f" else np.array("NaT", rows.dtype) if rows.dtype.kind in "Mm" else 0
    mask = np.zeros(rows.shape, bool)
    mask[~valid] = True
    return np.ma.MaskedArray(rows, mask)


def cast_tensors(column: pa.ChunkedArray, kind: Any) -> pa.ChunkedArray:
    """Return a tensor column in another type for the same arrays. Raises ValueError if the arrays do not fit."""
    if not plain_tensor(kind).equals(plain_tensor(column.type)):
        raise ValueError(f"arrays of type {column.type} can't become {kind}")
    found = [_tensors(np.ascontiguousarray(rows), valid, kind) for rows, valid in map(_stack, column.chunks)]
    return pa.chunked_array(found, kind)


def stacks_of(table: pa.Table) -> dict[str, Any]:
    """Return every column of a table as an array [rows, ...]. Raises Unfit for a column with a null or other values.

    Numbers, booleans, datetimes and time differences have one element in each row. Times with a zone are in UTC.
    """
    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise Unfit(name, "a value is missing (null): fill it, for example with NaN, or drop the record", row)
        try:
            if not is_tensor(column.type):
                check_elements(without_zone(column.type))
                found[name] = np.asarray(column.to_numpy())
            else:
                found[name] = stack_of(column)
        except ValueError as error:
            raise Unfit(name, error) from error
    return found


def table_of_stacks(stacks: Mapping[str, Any]) -> pa.Table:
    """Return arrays [rows, ...] as the columns of a table."""
    return pa.table(
        {
            name: pa.array(with_short_days(each)) if each.ndim == 1 else tensors_of_stack(each)
            for name, each in stacks.items()
        }
    )


def without_zone(kind: Any) -> Any:
    """Return the type of the same instants in UTC without a zone, if it is the type of datetimes with a zone."""
    return pa.timestamp(kind.unit) if pat.is_timestamp(kind) and kind.tz is not None else kind
