"""Coordinates: the values along dimensions. Encodes times exactly, and finds the position of a value.

CF conventions: a time is a number with units such as "seconds since 1970-01-01" and a calendar. Times of the standard
calendar are `datetime64` values. Times of other calendars (noleap, 360_day) are ISO text, because neither Arrow nor
NumPy has a type for them.
"""

from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

STANDARD_CALENDARS = ("standard", "gregorian", "proleptic_gregorian")

_UNITS = {"seconds": "s", "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}

_NANOSECONDS = {"W": 604_800 * 10**9, "D": 86_400 * 10**9, "h": 3_600 * 10**9, "m": 60 * 10**9}
_NANOSECONDS |= {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}

_EPOCH = dt.datetime(1970, 1, 1)


def calendar_of(attributes: Mapping[str, Any]) -> str | None:
    """Return the calendar of a variable of times, or None if the variable does not hold times."""
    if " since " not in str(attributes.get("units", "")):
        return None
    return str(attributes.get("calendar", "standard")).lower()


def encode_coordinate(name: str, values: Any, attributes: Mapping[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return the array and the attributes with which a store holds the values of a coordinate.

    Times become int64, by default in the first of seconds, milliseconds, microseconds and nanoseconds in which all of
    them are exact. Raises ConfigError for values that no store can hold, or that are not exact in the units of
    `attributes`.
    """
    array, attributes = _as_array(name, values), dict(attributes)
    if array.dtype.kind == "O" and len(array) and hasattr(array.flat[0], "calendar"):
        return _encode_cftime(name, array, attributes)
    if array.dtype.kind in "mM":
        return _encode_times(name, array, attributes)
    if array.dtype.kind not in "biufUS":
        raise ConfigError(
            f"coordinate {name!r} can't be written",
            expected="numbers, times, time differences or text",
            got=f"values of type {array.dtype}",
        )
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)), attributes


def _as_array(name: str, values: Any) -> NDArray[Any]:
    if isinstance(values, (list, tuple)) and any(isinstance(each, dt.datetime) and each.tzinfo for each in values):
        values = [each.astimezone(dt.UTC).replace(tzinfo=None) for each in values]
    if np.ma.is_masked(values):
        raise ConfigError(f"coordinate {name!r} can't be written", expected="values", got="masked values")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ConfigError(f"coordinate {name!r} is not an array: {error}") from error
    kinds = {type(each) for each in array.flat} if array.dtype.kind == "O" else set()
    if kinds and all(issubclass(kind, (dt.date, np.datetime64)) for kind in kinds):
        return array.astype("datetime64[us]")
    if kinds and all(issubclass(kind, (dt.timedelta, np.timedelta64)) for kind in kinds):
        return array.astype("timedelta64[us]")
    if array.dtype.kind in "mM" and np.datetime_data(array.dtype)[0] in ("Y", "M"):
        return array.astype("datetime64[D]") if array.dtype.kind == "M" else array
    return array.astype(f"U{max(map(len, array.flat))}") if kinds == {str} else array


def _encode_times(name: str, array: NDArray[Any], attributes: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
    kind = "datetime64" if array.dtype.kind == "M" else "timedelta64"
    if np.isnat(array).any():
        raise ConfigError(f"coordinate {name!r} has a missing time (NaT)")
    given = attributes.get("units")
    if given is not None:
        return _encode_in_units(name, array, attributes)
    shortened = {word: array.astype(f"{kind}[{unit}]") for word, unit in _UNITS.items()}
    word = next((word for word, short in shortened.items() if _is_same(short, array)), None)
    if word is None:
        raise ConfigError(f"the times of coordinate {name!r} are not exact in nanoseconds", got=str(array.dtype))
    attributes["units"] = f"{word} since 1970-01-01 00:00:00" if kind == "datetime64" else word
    if kind == "datetime64":
        attributes.setdefault("calendar", "proleptic_gregorian")
    else:
        attributes["dtype"] = "timedelta64[ns]"  # otherwise new versions of xarray don't decode the numbers
    return shortened[word].astype("<i8"), attributes


def _is_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return [_exact(value) for value in one.flat] == [_exact(value) for value in other.flat]


def _encode_in_units(name: str, array: NDArray[Any], attributes: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
    from xarray.coding.times import encode_cf_datetime, encode_cf_timedelta

    units, calendar = str(attributes["units"]), str(attributes.get("calendar", "proleptic_gregorian"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # xarray warns of times that are not exact, which the comparison below finds
        if array.dtype.kind == "M":
            attributes["calendar"] = calendar
            encoded = encode_cf_datetime(array, units, calendar)[0]
        else:
            attributes["dtype"] = "timedelta64[ns]"
            encoded = encode_cf_timedelta(array, units)[0]
    numbers = np.rint(np.asarray(encoded, dtype="f8")).astype("<i8")
    if not _is_same(decode_coordinate(numbers, attributes), array):
        raise ConfigError(
            f"the times of coordinate {name!r} are not exact in its units",
            expected=f"whole numbers of {units}",
            hint="leave out `units` of its attributes, so that units are chosen in which all times are exact",
        )
    return numbers, attributes


def _encode_cftime(name: str, array: NDArray[Any], attributes: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
    import cftime

    calendars = {value.calendar for value in array.flat}
    if len(calendars) > 1:
        raise ConfigError(f"coordinate {name!r} has times of several calendars", got=", ".join(sorted(calendars)))
    calendar = calendars.pop()
    words = [f"{word} since 1970-01-01 00:00:00" for word in ("seconds", "microseconds")]
    for units in [attributes["units"]] if "units" in attributes else words:
        numbers = np.asarray(cftime.date2num(array, units, calendar))
        if np.array_equal(numbers, np.rint(numbers)):
            return numbers.astype("<i8"), {**attributes, "units": units, "calendar": calendar}
    raise ConfigError(f"the times of coordinate {name!r} are not exact in its units", got=units)


def objects_of(values: NDArray[Any], attributes: Mapping[str, Any]) -> Any:
    """Return what `encode_coordinate` encodes as the same values: `cftime` objects for times of other calendars."""
    calendar = calendar_of(attributes)
    if calendar is None or calendar in STANDARD_CALENDARS:
        return decode_coordinate(values, attributes)
    import cftime

    return np.asarray(cftime.num2date(values, str(attributes["units"]), calendar), dtype=object)


def decode_coordinate(values: NDArray[Any], attributes: Mapping[str, Any]) -> NDArray[Any]:
    """Return the values that an array of a store stands for: `datetime64`, `timedelta64`, text, or the array itself.

    Times of other calendars than the standard one are ISO text. Raises ValueError for wrong units or calendars.
    """
    calendar = calendar_of(attributes)
    if calendar is not None:
        return _decode_times(values, str(attributes["units"]), calendar)
    if str(attributes.get("dtype", "")).startswith("timedelta64") and "units" in attributes:
        from xarray.coding.times import decode_cf_timedelta

        return np.asarray(decode_cf_timedelta(values, str(attributes["units"])))
    if values.dtype.kind in "OTS":
        texts = [each.decode() if isinstance(each, bytes) else str(each) for each in values.flat]
        return np.array(texts, dtype=str).reshape(values.shape)
    return values


def _decode_times(values: NDArray[Any], units: str, calendar: str) -> NDArray[Any]:
    from xarray.coding.times import decode_cf_datetime

    if not values.size:
        return np.empty(values.shape, "datetime64[us]" if calendar in STANDARD_CALENDARS else "U1")
    standard = calendar in STANDARD_CALENDARS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # xarray warns of years that NumPy can't hold in this calendar
        use_cftime = None if standard else True
        times = np.asarray(decode_cf_datetime(values, units, calendar, use_cftime=use_cftime, time_unit="us"))
    if times.dtype.kind == "M":
        return times
    return np.array([each.isoformat() for each in times.flat], dtype=str).reshape(times.shape)


def key_of(value: Any) -> Any:
    """Return a value by which a coordinate is found: equal for equal numbers, texts and instants of any type.

    Instants and time differences are compared exactly, in nanoseconds. Raises ValueError for a missing time.
    """
    if isinstance(value, np.generic) and value.dtype.kind not in "mM":
        value = value.item()
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (np.datetime64, np.timedelta64, dt.date, dt.timedelta)):
        kind = "time" if isinstance(value, (np.datetime64, dt.date)) else "difference"
        return kind, _exact(value)
    return value.isoformat() if hasattr(value, "calendar") else value


def _exact(value: Any) -> int:
    """Return a time since 1970, or a time difference, in nanoseconds."""
    if isinstance(value, np.generic):
        unit, step = np.datetime_data(value.dtype)  # type: ignore[arg-type]
        if unit in ("Y", "M") and value.dtype.kind == "M":
            value, unit, step = value.astype("datetime64[D]"), "D", 1
        if np.isnat(value) or unit not in _NANOSECONDS:
            raise ValueError(f"the time is missing, or has units without a fixed length: {value!r}")
        return int(value.astype("i8")) * step * _NANOSECONDS[unit]
    if isinstance(value, dt.datetime):
        naive = value.replace(tzinfo=None) if value.tzinfo is None else value.astimezone(dt.UTC).replace(tzinfo=None)
        return _microseconds(naive - _EPOCH) * 1000 + getattr(value, "nanosecond", 0)
    if isinstance(value, dt.date):
        return (value - _EPOCH.date()).days * _NANOSECONDS["D"]
    return _microseconds(value) * 1000 + getattr(value, "nanoseconds", 0)


def _microseconds(difference: dt.timedelta) -> int:
    return (difference.days * 86_400 + difference.seconds) * 10**6 + difference.microseconds
