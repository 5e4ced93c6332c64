"""The form of NumPy arrays in JSON lines, from which the same array is read again: its type, its shape and its bits.

    {"__ndarray__": "AACAPwAAAEA=", "dtype": "float32", "shape": [2]}

`__ndarray__` is the Base64 form of the elements in C order, little-endian. A list of numbers would lose the type and
the shape, and JSON has no NaN.
"""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import numpy as np

from manyhands.data.array_format import KINDS
from manyhands.prepare.records.array_columns import element_type

MARK = b'"__ndarray__"'  # lines without this text have no arrays

_KEYS = {"__ndarray__", "dtype", "shape"}


class DamagedArray(ValueError):
    """The error for the form of an array from which no array can be read."""


def array_to_json(array: Any) -> dict[str, Any]:
    """Return the JSON form of an array. Raises TypeError for elements that are not numbers, booleans or times."""
    try:
        element_type(array.dtype)
    except ValueError:
        raise TypeError(f"an array of type {array.dtype} has no form in JSON: convert it with .tolist()") from None
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("a masked array has no form in JSON: fill it first, for example with NaN")
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "__ndarray__": base64.b64encode(plain.tobytes()).decode(),
        "dtype": str(array.dtype.newbyteorder("=")),
        "shape": list(array.shape),
    }


def with_arrays(value: Any) -> Any:
    """Return a parsed JSON value with its arrays, at any depth. Raises DamagedArray."""
    if isinstance(value, dict):
        if value.keys() == _KEYS and isinstance(value["__ndarray__"], str):
            return _array(value["__ndarray__"], value["dtype"], value["shape"])
        return {key: with_arrays(item) for key, item in value.items()}
    return list(map(with_arrays, value)) if isinstance(value, list) else value


def _array(data: str, name: Any, shape: Any) -> Any:
    try:
        if name not in KINDS:  # np.dtype would parse any text as a description of fields
            raise ValueError("its dtype is not one of " + ", ".join(sorted(KINDS)))
        dtype = np.dtype(name)
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("its shape is not a list of whole numbers")
        found = base64.b64decode(data, validate=True)
        if len(found) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it has {len(found)} bytes, and not those of shape {shape} and type {name}")
        return np.frombuffer(bytearray(found), dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
    except (TypeError, ValueError, binascii.Error) as error:
        raise DamagedArray(f"the line has an array that can't be read: {error}") from error
