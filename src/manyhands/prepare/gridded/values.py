"""Converts the arrays of records to the types in which a store holds them. No value changes without an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def stored_values(array: NDArray[Any], kind: np.dtype[Any], packing: Mapping[str, float] | None) -> NDArray[Any]:
    """Return the array with the stored type. Floats may be rounded to shorter floats, or to the steps of a packing.

    Raises ValueError for a value that the type can't hold, and for other types than numbers.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"the array has values of type {array.dtype}, not numbers")
    if packing is not None:
        return _packed(array, kind, packing)
    if array.dtype == kind:
        return array
    with np.errstate(all="ignore"):
        stored = array.astype(kind)
        if kind.kind == "f" and array.dtype.kind == "f":
            wrong = np.isfinite(array) & ~np.isfinite(stored)
        else:
            wrong = (stored.astype(array.dtype) != array) | _wraps(array, kind)
    if wrong.any():
        raise ValueError(f"the value {array[wrong][0].item()!r} can't be held by its type {kind}")
    return stored


def _wraps(array: NDArray[Any], kind: np.dtype[Any]) -> Any:
    """Return True where a conversion to this type changes a value in a way that a conversion back would undo."""
    if kind.kind == "b":
        return array.astype("f8") > 1
    if kind.kind not in "iu" or array.dtype.kind == "b":
        return np.zeros(array.shape, bool)
    limits = np.iinfo(kind)
    if array.dtype.kind == "f":
        return ~((array >= limits.min) & (array < float(limits.max) + 1))
    own = np.iinfo(array.dtype)
    wrong = np.zeros(array.shape, bool)
    if own.min < limits.min:
        wrong |= array < limits.min
    if own.max > limits.max:
        wrong |= array > limits.max
    return wrong


def _packed(array: NDArray[Any], kind: np.dtype[Any], packing: Mapping[str, float]) -> NDArray[Any]:
    """Return integers n, so that n * scale_factor + add_offset is the nearest such number to each value."""
    missing = packing["_FillValue"]
    wide = array.astype("f8")
    with np.errstate(all="ignore"):
        steps = np.rint((wide - packing["add_offset"]) / packing["scale_factor"])
    limits, present = np.iinfo(kind), ~np.isnan(wide)
    with np.errstate(all="ignore"):
        # For types of 64 bits, float(max) is beyond the type.
        wrong = present & ~((steps >= limits.min) & (steps < float(limits.max) + 1) & (steps != missing))
    if wrong.any():
        raise ValueError(
            f"the value {array[wrong][0].item()!r} can't be packed into {kind} with scale_factor "
            f"{packing['scale_factor']} and add_offset {packing['add_offset']}"
        )
    stored = np.full(array.shape, missing, kind)
    stored[present] = steps[present].astype(kind)
    return stored
