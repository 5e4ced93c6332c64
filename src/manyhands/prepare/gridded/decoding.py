"""Decodes stored values by their own attributes, following the CF conventions: missing values, scale and offset.

Only the attributes `_FillValue` and `missing_value` make a value missing. The fill value of a zarr array does not: it
is the value of chunks that were never written.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PACKING = ("scale_factor", "add_offset")

_ENCODING = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned", "dtype")
"""The attributes that say how values are stored. They don't apply to decoded values."""


class MissingIntegers(ValueError):
    """The error for missing values among integers, which have no value for them, and for integers no float holds."""


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes as values that JSON holds: text, numbers, booleans, and lists and dicts of these.

    The numbers of a packing keep their types, which decide the type of unpacked values.
    """
    return {
        str(name): value if name in _PACKING and isinstance(value, np.generic) else _plain(value)
        for name, value in attributes.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value.tolist()]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return {str(key): _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def descriptive(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that also apply to decoded values, such as units and names."""
    return {name: value for name, value in attributes.items() if name not in _ENCODING}


def reading_attributes(
    attributes: Mapping[str, Any], dtype: np.dtype[Any], fill: Any, meaning: str | None
) -> Mapping[str, Any]:
    """Return the attributes by which values are decoded: with the fill value of the array, if it means "missing".

    fill: the fill value of the array, or None. meaning: the option `fill_value` of `ArrayOptions`.
    """
    if meaning != "missing" or fill is None or missing_values(dtype, attributes):
        return attributes
    return {**attributes, "_FillValue": fill}


def as_common_type(values: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Return the values in the type that several files share. Raises MissingIntegers for an integer that changes."""
    found = values.astype(kind)
    if kind.kind == "f" and values.dtype.kind in "iu":
        _check_exact(values, found, np.ones(values.shape, bool))
    return found


def _check_exact(integers: NDArray[Any], floats: NDArray[Any], checked: NDArray[Any]) -> None:
    """Raise MissingIntegers if a checked integer has changed."""
    with np.errstate(all="ignore"):
        # The largest integers round to a float beyond their type, whose conversion back is undefined.
        wrong = (floats >= float(np.iinfo(integers.dtype).max) + 1) | (floats.astype(integers.dtype) != integers)
    wrong &= checked
    if wrong.any():
        raise MissingIntegers(f"the integer {integers[wrong][0]} is not exact as a float")


def missing_values(dtype: np.dtype[Any], attributes: Mapping[str, Any]) -> list[Any]:
    """Return the stored values that mean "missing". Values that the type can't hold are left out."""
    found = []
    for name in ("_FillValue", "missing_value"):
        given = attributes.get(name)
        for value in given if isinstance(given, list) else [given]:
            number = _number(value, dtype)
            if number is not None and number not in found:
                found.append(number)
    return found


def _number(value: Any, dtype: np.dtype[Any]) -> Any:
    """Return a value of an attribute in this type, or None. Stores of format 3 hold floats as base64 text."""
    if isinstance(value, str) and dtype.kind in "iuf":
        try:
            value = float(value)
        except ValueError:
            from xarray.backends.zarr import FillValueCoder

            try:
                value = FillValueCoder.decode(value, dtype)
            except (ValueError, TypeError):
                return None
    if value is None or isinstance(value, str) or dtype.kind not in "iuf":
        return None
    if dtype.kind == "f":
        with np.errstate(all="ignore"):
            return dtype.type(value)
    if not np.isfinite(value) or value != int(value):
        return None
    number, bits = int(value), 8 * dtype.itemsize
    if not -(1 << (bits - 1)) <= number < 1 << bits:
        return None
    # The attribute of an unsigned type may be a signed number, and the other way round.
    return np.array([number % (1 << bits)], f"u{dtype.itemsize}").view(dtype)[0]


def decoded(values: NDArray[Any], attributes: Mapping[str, Any], *, integers_as_floats: bool = False) -> NDArray[Any]:
    """Return the values that stored values stand for. Missing values of floats, and of packed integers, become NaN.

    Integers that are not packed stay integers. Raises MissingIntegers if one of them is missing, unless
    `integers_as_floats`: then variables with an attribute for missing values become floats.
    """
    values = _with_sign(values, attributes)
    missing = missing_values(values.dtype, attributes)
    if any(name in attributes for name in _PACKING):
        return _unpacked(values, attributes, missing)
    if not missing:
        return values
    mask = np.zeros(values.shape, bool)
    for value in missing:
        mask |= values == value
    if values.dtype.kind == "f":
        return np.where(mask, values.dtype.type(np.nan), values) if mask.any() else values
    if integers_as_floats:
        return _as_floats(values, mask)
    if mask.any():
        raise MissingIntegers(f"{int(mask.sum())} of {values.size} values are missing ({missing[0]})")
    return values


def _with_sign(values: NDArray[Any], attributes: Mapping[str, Any]) -> NDArray[Any]:
    """Apply `_Unsigned`: netCDF-3 has no unsigned types, so files hold them as signed ones."""
    given = str(attributes.get("_Unsigned", "")).lower()
    if given == "true" and values.dtype.kind == "i":
        return values.view(f"u{values.dtype.itemsize}")
    return values.view(f"i{values.dtype.itemsize}") if given == "false" and values.dtype.kind == "u" else values


def _unpacked(values: NDArray[Any], attributes: Mapping[str, Any], missing: list[Any]) -> NDArray[Any]:
    """Return scaled values, with the same bits as xarray."""
    import xarray as xr

    packing = {name: attributes[name] for name in _PACKING if name in attributes}
    packing = {name: value[0] if isinstance(value, list) else value for name, value in packing.items()}
    if missing:
        packing["_FillValue"] = missing[0]
        for value in missing[1:]:
            values = np.where(values == value, missing[0], values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = xr.Variable([f"dim_{axis}" for axis in range(values.ndim)], values, packing)
        return np.asarray(xr.conventions.decode_cf_variable("values", stored, decode_times=False).values)


def _as_floats(values: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    floats = values.astype("f4" if values.dtype.itemsize <= 2 else "f8")
    _check_exact(values, floats, ~mask)
    floats[mask] = np.nan
    return floats
