"""The one total order of keys, which decides what may be a key, and how keys are compared.

Sorting, grouping and joining are consistent only if `<`, `==` and `hash` are consistent, and if Arrow orders a column
in the same way. Some values have inconsistent comparisons in Python. They are replaced by values with consistent
comparisons:

- A datetime whose zone changes its offset: two of them may be equal in Python although they are an hour apart, because
  Python compares the times on the clock. It is replaced by the same instant in UTC, which Arrow compares, too.
- A NumPy scalar: NumPy converts an integer to a float before it compares the two. It is replaced by the Python value.
- A list is replaced by a tuple, and a dataclass with `order=True` by its fields.

Values without a total order, such as NaN and sets, are refused.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Set
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np

from manyhands.errors import DataError, ManyhandsError
from manyhands.prepare.records.pipeline import BadKey

T = TypeVar("T")

_PLAIN = frozenset({str, int, bytes, bool, date, time, timedelta, Fraction})  # types that are compared unchanged

# Types whose values are written as the Python values that they equal.
_SAME_IN_FILES = (np.bool_, np.int64, np.float64, np.str_, np.bytes_)

_NANOSECONDS = {"h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 1000, "ns": 1}

_DAYS = ("D", "W", "M", "Y")


TIME, ZONED_TIME, TIME_OF_DAY, DURATION, DATE = "time", "time with a zone", "time of day", "duration", "date"

NANOSECONDS_PER_DAY = 24 * 3600 * 10**9

_MICROSECOND = timedelta(microseconds=1)


class FineTime:
    """A time, date or duration that Python's types can't hold: finer than a microsecond, or beyond the year 9999.

    It is compared with values of these types exactly. kind: TIME, ZONED_TIME, TIME_OF_DAY, DURATION or DATE.
    nanoseconds: the time since 1970 (in UTC if it has a zone), or since midnight.
    """

    __slots__ = ("kind", "nanoseconds")

    def __init__(self, kind: str, nanoseconds: int) -> None:
        self.kind, self.nanoseconds = kind, nanoseconds

    def _same(self, other: object) -> int | None:
        """Return the nanoseconds of a value of the same kind, or None for any other value."""
        if isinstance(other, FineTime):
            return other.nanoseconds if other.kind == self.kind else None
        if isinstance(other, datetime):
            zone = None if other.tzinfo is None else UTC
            if self.kind != (TIME if zone is None else ZONED_TIME):
                return None
            return (other - datetime(1970, 1, 1, tzinfo=zone)) // _MICROSECOND * 1000
        if isinstance(other, timedelta):
            return other // _MICROSECOND * 1000 if self.kind == DURATION else None
        if isinstance(other, time) and self.kind == TIME_OF_DAY and other.tzinfo is None:
            return (datetime.combine(date.min, other) - datetime.min) // _MICROSECOND * 1000
        if isinstance(other, date):
            return (other - date(1970, 1, 1)).days * NANOSECONDS_PER_DAY if self.kind == DATE else None
        return None

    def __eq__(self, other: object) -> bool:
        return self._same(other) == self.nanoseconds

    def __hash__(self) -> int:
        return hash((self.kind, self.nanoseconds))

    def __lt__(self, other: object) -> bool:
        nanoseconds = self._same(other)
        return NotImplemented if nanoseconds is None else self.nanoseconds < nanoseconds

    def __gt__(self, other: object) -> bool:
        nanoseconds = self._same(other)
        return NotImplemented if nanoseconds is None else self.nanoseconds > nanoseconds

    def __reduce__(self) -> tuple[Any, ...]:
        return FineTime, (self.kind, self.nanoseconds)

    def __repr__(self) -> str:
        return f"{self.kind} {self.nanoseconds} ns"


def time_of(kind: str, nanoseconds: int) -> Any:
    """Return a Python time, date or duration, or a FineTime if Python's type can't hold it."""
    microseconds, rest = divmod(nanoseconds, 1000)
    if rest:
        return FineTime(kind, nanoseconds)
    try:
        if kind == DURATION:
            return timedelta(microseconds=microseconds)
        if kind == TIME_OF_DAY:
            return (datetime.min + timedelta(microseconds=microseconds)).time()
        if kind == DATE:
            return date(1970, 1, 1) + timedelta(microseconds=microseconds)
        return datetime(1970, 1, 1, tzinfo=UTC if kind == ZONED_TIME else None) + timedelta(microseconds=microseconds)
    except OverflowError:
        return FineTime(kind, nanoseconds)


_BUILT_IN = _PLAIN | {float, Decimal, datetime, FineTime}  # these have a total order, or are refused


class Shown:
    """A key of a group that is compared as one value and shown in the result as another."""

    __slots__ = ("compared", "shown")

    def __init__(self, compared: Any, shown: Any) -> None:
        self.compared, self.shown = compared, shown

    def __eq__(self, other: object) -> bool:
        return bool(self.compared == (other.compared if isinstance(other, Shown) else other))

    def __hash__(self) -> int:
        return hash(self.compared)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shown, (self.compared, self.shown)

    def __repr__(self) -> str:
        return repr(self.shown)


class _Fields:
    """The values by which a dataclass with `order=True` is compared. Instances of different classes are never equal."""

    __slots__ = ("kind", "values")

    def __init__(self, kind: str, values: tuple[Any, ...]) -> None:
        self.kind, self.values = kind, values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fields) and (self.kind, self.values) == (other.kind, other.values)

    def __hash__(self) -> int:
        return hash((self.kind, self.values))

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, _Fields) or other.kind != self.kind:
            return NotImplemented
        return self.values < other.values

    def __reduce__(self) -> tuple[Any, ...]:
        return _Fields, (self.kind, self.values)

    def __repr__(self) -> str:
        return f"{self.kind}{self.values}"


def ordered_keys(keys: list[Any]) -> list[Any]:
    """Return the keys in a form that has a total order, or the same list if the keys already have a total order.

    Raises BadKey for a key that has no total order.
    """
    if _are_ordered(keys):
        return keys
    return list(map(_ordered, keys))


def group_keys(keys: list[Any]) -> list[Any]:
    """Do the same as `ordered_keys` for keys of groups, which remember their form in the result."""
    if _are_ordered(keys):
        return keys
    return [_group_key(key, _ordered(key)) for key in keys]


def _group_key(key: Any, ordered: Any) -> Any:
    return ordered if ordered is key or isinstance(key, _SAME_IN_FILES) else Shown(ordered, key)


def compared(keys: list[Any]) -> list[Any]:
    """Return the values by which keys of groups are compared."""
    return [compared_key(key) for key in keys] if Shown in set(map(type, keys)) else keys


def compared_key(key: Any) -> Any:
    """Return the value by which a key is compared."""
    return key.compared if type(key) is Shown else key


def shown_keys(keys: list[Any]) -> list[Any]:
    """Return the keys of groups as the result shows them."""
    if Shown not in set(map(type, keys)):
        return keys
    return [key.shown if type(key) is Shown else key for key in keys]


def _are_ordered(keys: list[Any]) -> bool:
    """Return True if the keys, or the items of tuples, have built-in types that need no change.

    Raises BadKey for NaN.
    """
    kinds = set(map(type, keys))
    values: Iterable[Any] = keys
    if kinds == {tuple}:
        values = list(chain.from_iterable(keys))
        kinds = set(map(type, values))
    if not kinds <= _PLAIN:
        if not kinds <= _PLAIN | {float}:
            return False
        if any(map(operator.ne, values, values)):  # only NaN differs from itself
            raise _nan()
    return True


def _ordered(key: Any) -> Any:
    kind: Any = type(key)  # mypy does not know that types are hashable
    convert = _converter(kind)
    return key if convert is None else convert(key)


@lru_cache(maxsize=256)
def _converter(kind: type) -> Callable[[Any], Any] | None:
    """Return a function that checks and converts keys of a type, or None if they are compared unchanged.

    Raises BadKey if the type has no total order.
    """
    if kind in _PLAIN:
        return None
    if kind is type(None) or (kind.__name__ == "NAType" and kind.__module__.startswith("pandas")):
        raise BadKey("the key is None: drop such records, or give them another key")
    for refused, name, cure in _REFUSED:
        if issubclass(kind, refused):
            raise BadKey(f"the key is {name} ({kind.__name__}), and these have no total order: {cure}")
    for base, convert in _CONVERTERS:
        if issubclass(kind, base):
            return convert
    if dataclasses.is_dataclass(kind):
        return _ordered_dataclass
    return None


_REFUSED: tuple[tuple[Any, str, str], ...] = (
    (Set, "a set", "use tuple(sorted(...))"),
    (Mapping, "a dict", "use a tuple of its values, or the name of a column"),
    (complex, "a complex number", "use a tuple of its parts"),
    (np.complexfloating, "a complex number", "use a tuple of its parts"),
    ((np.ndarray, np.void, np.longdouble), "a NumPy value", "use .tolist(), or numbers, text, bytes or tuples of them"),
)


def _nan() -> BadKey:
    return BadKey("the key is NaN, which equals no other key: drop such records, or give them another key")


def _ordered_numpy(key: Any) -> Any:
    if isinstance(key, (np.datetime64, np.timedelta64)):
        if np.isnat(key):
            raise _nan()
        unit, count = np.datetime_data(key.dtype)
        if isinstance(key, np.datetime64) and unit in _DAYS:
            key, unit, count = key.astype("datetime64[D]"), "h", 24
        elif unit in ("D", "W"):
            unit, count = "h", count * (24 if unit == "D" else 168)
        if unit not in _NANOSECONDS:
            raise BadKey(f"the key is a NumPy time with the unit {unit!r}: use one of {', '.join(_NANOSECONDS)}")
        kind = TIME if isinstance(key, np.datetime64) else DURATION
        return time_of(kind, int(key.astype(np.int64)) * count * _NANOSECONDS[unit])
    return _ordered(key.item())


def _ordered_decimal(key: Any) -> Any:
    if key.is_nan():
        raise _nan()
    return key


def _ordered_float(key: Any) -> Any:
    if key != key:
        raise _nan()
    return key


def _ordered_datetime(key: Any) -> Any:
    if key != key:  # pandas.NaT
        raise _nan()
    if type(key) is not datetime:
        return _ordered_subclass_of_datetime(key)
    return key if key.tzinfo is None or type(key.tzinfo) is timezone else _in_utc(key)


def _in_utc(key: datetime) -> datetime:
    if key.utcoffset() is None:
        return key.replace(tzinfo=None)
    try:
        return key.astimezone(UTC)
    except OverflowError:
        raise BadKey(f"the key {key.isoformat()} lies outside of the years 1 to 9999 in UTC") from None


def _ordered_subclass_of_datetime(key: Any) -> Any:
    """Convert a pandas.Timestamp, which has nanoseconds, or another subclass of datetime, which is compared as a
    datetime.
    """
    nanosecond = getattr(key, "nanosecond", 0)
    plain = datetime(
        key.year, key.month, key.day, key.hour, key.minute, key.second, key.microsecond, key.tzinfo, fold=key.fold
    )
    ordered = _ordered_datetime(plain)
    if not nanosecond:
        return ordered
    zone = None if ordered.tzinfo is None else UTC
    microseconds = (ordered - datetime(1970, 1, 1, tzinfo=zone)) // _MICROSECOND
    return time_of(TIME if zone is None else ZONED_TIME, microseconds * 1000 + nanosecond)


def _ordered_sequence(key: Any) -> Any:
    ordered = tuple(map(_ordered, key))
    unchanged = isinstance(key, tuple) and all(map(operator.is_, ordered, key)) and type(key).__lt__ is tuple.__lt__
    return key if unchanged else ordered


def _ordered_dataclass(key: Any) -> Any:
    """Check the fields of a dataclass. With `order=True`, return the fields that the dataclass compares."""
    values = [getattr(key, field.name) for field in dataclasses.fields(key) if field.compare]
    for value in values:
        if value is None or isinstance(value, (float, Decimal, tuple, list)):
            _ordered(value)
    kind = type(key)
    # Unlike methods that the user wrote, methods that the dataclass generated have no file.
    generated = [getattr(vars(kind).get(name), "__code__", None) for name in ("__lt__", "__eq__")]
    if not all(code is not None and code.co_filename == "<string>" for code in generated):
        return key
    return _Fields(f"{kind.__module__}.{kind.__qualname__}", tuple(map(_ordered, values)))


# The order of the entries matters, because a np.float64 is a float, and a datetime is a date.
_CONVERTERS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (np.generic, _ordered_numpy),
    (float, _ordered_float),
    (Decimal, _ordered_decimal),
    (datetime, _ordered_datetime),
    (tuple, _ordered_sequence),
    (list, _ordered_sequence),
    (bytearray, bytes),
)


def check_hashable(keys: list[Any]) -> None:
    """Raise BadKey if a key has no hash."""
    if are_built_in(keys):
        return
    try:
        for key in keys:
            hash(key)
    except TypeError as error:
        raise BadKey(f"a key is not hashable ({error}): use numbers, text, bytes or tuples of them") from error


def compare_keys(compare: Callable[[], T]) -> T:
    """Return `compare()`. Raises DataError if the keys can't be compared."""
    try:
        return compare()
    except TypeError as error:
        raise DataError(
            f"keys of different types can't be sorted: {error}",
            expected="keys of one type: numbers, text, bytes, or tuples of them",
            hint="return one type from the key function, for example key=lambda record: str(...)",
        ) from error
    except ManyhandsError:
        raise
    except Exception as error:
        raise DataError(
            f"keys can't be compared: {type(error).__name__}: {error}",
            hint="correct the methods by which the keys are compared, or use keys of numbers, text, bytes or tuples",
        ) from error


def check_order(keys: list[Any], *, descending: bool = False, always: bool = False) -> None:
    """Check that sorted keys are in order, unless their types are known to have a total order.

    always: if True, check keys of any type. Raises DataError if a key is neither less than nor equal to the next key.
    """
    if not always and are_built_in(keys):
        return
    for first, second in pairwise(keys):
        low, high = (second, first) if descending else (first, second)
        if not compare_keys(lambda low=low, high=high: _is_less_or_equal(low, high)):  # type: ignore[misc]
            raise DataError(
                "keys have no total order",
                expected="any two keys are equal (==, with equal hashes), or one is less (<) than the other",
                got=f"{low!r:.100} and {high!r:.100}",
                hint="correct __eq__, __lt__ and __hash__ of the keys' type, or use keys of numbers, text, bytes or "
                "tuples of them",
            )


def _is_less_or_equal(low: Any, high: Any) -> bool:
    if low < high:
        return not high < low
    return not high < low and low == high and (type(low).__hash__ is None or hash(low) == hash(high))


def are_built_in(keys: list[Any]) -> bool:
    """Return True if all keys, and all items of tuples at any depth, have types that are known to have a total
    order.
    """
    kinds = set(map(type, keys))
    items: list[Any] = keys
    while tuple in kinds:
        items = list(chain.from_iterable(item for item in items if type(item) is tuple))
        kinds = (kinds - {tuple}) | set(map(type, items))
    return kinds <= _BUILT_IN
