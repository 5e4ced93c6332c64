"""Sums that are exact until they are rounded once, so that they don't depend on how the records are divided.

A float is a whole number times a power of two, so a sum of floats has an exact value. The state of a sum holds this
value, whatever the order and the division of the records. The result is the nearest float, which `math.fsum` also
returns.

The state of a sum of floats is a float if a float is exact, or else a pair if two floats are exact, or else an
`ExactSum`. A pair is a Python `complex`: the real part is the float nearest to the sum, and the imaginary part is the
remainder. No other object holds two floats in as little memory, and NumPy converts lists of them fast. Sums of complex
numbers have states of type `ComplexSum`.

Integers, fractions and decimals are their own states. Values of other types (lists, time differences) are added
by `+`.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from manyhands.errors import DataError

WHOLE = 2**53  # every integer up to this value is exact as a float

# Squares and sums of values between these limits are well inside a float's range, so that no step of `exact_sums` or
# `square_of` overflows or underflows.
LARGE, LARGE_ROOT, SMALL_ROOT = 2.0**960, 2.0**480, 2.0**-480

_DECIMAL_DIGITS = 100_000  # numbers of IEEE 754's decimal128 differ by at most 12,322 places

# This context adds and multiplies decimals exactly, or raises Inexact. NaN and opposite infinities give NaN, as for
# floats.
_EXACTLY = decimal.Context(
    prec=_DECIMAL_DIGITS,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=decimal.MIN_EMIN,
    Emax=decimal.MAX_EMAX,
    traps=[decimal.Inexact],
)


class ExactSum:
    """The exact sum of floats, integers and fractions, at least one of them a float: `sum(parts) + rest`.

    parts: finite floats, the largest first. Each is the float nearest to the sum of itself and all following parts.
    rest: a number that floats can't hold, usually 0.
    """

    __slots__ = ("parts", "rest")

    def __init__(self, parts: tuple[float, ...], rest: int | Fraction = 0) -> None:
        self.parts, self.rest = parts, rest

    def __reduce__(self) -> tuple[type[ExactSum], tuple[tuple[float, ...], int | Fraction]]:
        return ExactSum, (self.parts, self.rest)


class ComplexSum:
    """The exact sum of complex numbers: the states of their real and imaginary parts."""

    __slots__ = ("imaginary", "real")

    def __init__(self, real: Any, imaginary: Any) -> None:
        self.real, self.imaginary = real, imaginary

    def __reduce__(self) -> tuple[type[ComplexSum], tuple[Any, Any]]:
        return ComplexSum, (self.real, self.imaginary)


# The types of states that can be added exactly.
_PAIRS = {float, complex}
_FLOATS = {*_PAIRS, ExactSum}
_REAL = {int, Fraction, *_FLOATS}
_COMPLEX = {ComplexSum, *_REAL}
_DECIMAL = {Decimal, int}


def number_of(value: Any) -> Any:
    """Return a value as the state of a sum.

    Numbers of NumPy become Python numbers, which don't overflow, and True becomes 1.
    """
    kind = type(value)
    if kind is float or kind is int:
        return value
    if isinstance(value, Decimal):
        return Decimal("NaN") if value.is_nan() else value
    if isinstance(value, complex):  # this includes NumPy's complex128
        return ComplexSum(value.real, value.imag)
    if isinstance(value, (np.complexfloating, np.floating, np.integer)):
        return _python_number(value)
    if isinstance(value, np.bool_):
        return int(value)
    # These are truth values, members of an IntEnum, and other types that add as their base does.
    for base in (int, float):
        if isinstance(value, base) and kind.__add__ is base.__add__:
            return base(value)
    return value


def _python_number(value: Any) -> Any:
    if isinstance(value, np.complexfloating):
        return ComplexSum(number_of(value.real), number_of(value.imag))
    number = value.item()
    if not isinstance(number, np.floating):
        return number
    # NumPy's longdouble has more digits than a float.
    return ExactSum((), Fraction(*number.as_integer_ratio())) if np.isfinite(number) else float(number)


def add_sums(one: Any, other: Any) -> Any:
    """Return the exact sum of two states."""
    kind, other_kind = type(one), type(other)
    if kind is float and other_kind is float:
        total = one + other  # this is `two_sum` without a call, because most sums of floats are computed here
        virtual = total - one
        error = (one - (total - virtual)) + (other - virtual)
        if error == 0.0:
            return total
        return complex(total, error) if math.isfinite(error) else _sum_of_floats(one, other)
    if kind is int and other_kind is int:
        return one + other
    if kind in _PAIRS and other_kind in _PAIRS and (total := _sum_of_pairs(one, other)) is not None:
        return total
    if kind in _REAL and other_kind in _REAL:
        return _sum_of_floats(one, other) if {kind, other_kind} & _FLOATS else one + other
    if kind in _DECIMAL and other_kind in _DECIMAL:
        return decimally(_EXACTLY.add, one, other)
    if kind in _COMPLEX and other_kind in _COMPLEX:
        one, other = _complex_sum(one), _complex_sum(other)
        return ComplexSum(add_sums(one.real, other.real), add_sums(one.imaginary, other.imaginary))
    return total_of(one) + total_of(other)


def add_value(state: Any, value: Any) -> Any:
    """Return the exact sum of a state and a value."""
    return add_sums(state, number_of(value))


def total_of(state: Any) -> Any:
    """Return the value of a sum, rounded once. A sum beyond the range of floats is an infinity."""
    if type(state) is complex:
        return state.real
    if type(state) is ExactSum:
        return _quotient(*_ratio(state)) if state.rest else math.fsum(state.parts)
    if type(state) is ComplexSum:
        return complex(total_of(state.real), total_of(state.imaginary))
    return math.nan if type(state) is float and math.isnan(state) else state  # NaN has many bit patterns


def mean_of(state: Any, count: int) -> Any:
    """Return the value of a sum divided by `count`, rounded once."""
    if type(state) in (complex, ExactSum):
        numerator, denominator = _ratio(state)
        return _quotient(numerator, denominator * count)
    if type(state) is ComplexSum:
        return complex(mean_of(state.real, count), mean_of(state.imaginary, count))
    if isinstance(state, Decimal):
        return _divided(state, count)
    return total_of(state) / count


def variance_of(total: Any, squares: Any, count: int, divisor: int) -> Any:
    """Return the sum of the squared distances from the mean, divided by `divisor` and rounded once.

    total, squares: the sums of `count` values and of their squares. The result is NaN if a value is not finite.
    """
    if isinstance(total, Decimal):
        with_count = decimally(_EXACTLY.multiply, squares, count)
        minus = decimally(_EXACTLY.multiply, total, total)
        return _divided(decimally(_EXACTLY.subtract, with_count, minus), count * divisor)
    if isinstance(total, float) and not math.isfinite(total):
        return math.nan
    (sum_over, sum_under), (squares_over, squares_under) = _ratio(total), _ratio(squares)
    over = count * squares_over * sum_under**2 - sum_over**2 * squares_under
    under = squares_under * sum_under**2 * count * divisor
    return Fraction(over, under) if isinstance(total, Fraction) else _quotient(over, under)


def square_of(value: Any) -> Any:
    """Return the exact square of a number, as the state of a sum. Raises TypeError if it isn't a real number."""
    if type(value) is ComplexSum:
        raise TypeError("the variance of complex numbers isn't defined")
    if type(value) is float and math.isfinite(value):
        if value == 0.0 or SMALL_ROOT < abs(value) < LARGE_ROOT:
            square, error = square_and_error(value)
            return square if error == 0.0 else complex(square, error)
        return ExactSum((), Fraction(value) ** 2)
    if type(value) is ExactSum:
        return ExactSum((), Fraction(*_ratio(value)) ** 2)
    return decimally(_EXACTLY.multiply, value, value) if isinstance(value, Decimal) else value * value


def start_mean(value: Any) -> tuple[Any, int]:
    """Return the state of a mean: the state of the sum, and the count."""
    return number_of(value), 1


def add_to_mean(state: tuple[Any, int], value: Any) -> tuple[Any, int]:
    return add_value(state[0], value), state[1] + 1


def merge_means(state: tuple[Any, int], other: tuple[Any, int]) -> tuple[Any, int]:
    return add_sums(state[0], other[0]), state[1] + other[1]


def mean_of_state(state: tuple[Any, int]) -> Any:
    return mean_of(*state)


def start_variance(value: Any) -> tuple[Any, Any, int]:
    """Return the state of a variance: the states of the sum and of the sum of squares, and the count."""
    number = number_of(value)
    return number, square_of(number), 1


def add_to_variance(state: tuple[Any, Any, int], value: Any) -> tuple[Any, Any, int]:
    return merge_variances(state, start_variance(value))


def merge_variances(state: tuple[Any, Any, int], other: tuple[Any, Any, int]) -> tuple[Any, Any, int]:
    return add_sums(state[0], other[0]), add_sums(state[1], other[1]), state[2] + other[2]


def population_variance(state: tuple[Any, Any, int]) -> Any:
    return variance_of(*state, divisor=state[2])


def sample_variance(state: tuple[Any, Any, int]) -> Any:
    return None if state[2] == 1 else variance_of(*state, divisor=state[2] - 1)


def decimally(operation: Callable[[Any, Any], Decimal], one: Any, other: Any) -> Decimal:
    """Return `operation(one, other)`. All NaN are equal. Raises DataError if an exact result has too many digits."""
    try:
        result = operation(one, other)
    except decimal.Inexact as error:
        raise DataError(
            "a sum of decimals has too many digits",
            expected=f"at most {_DECIMAL_DIGITS:,} digits between the largest and the smallest number",
            got=f"{str(one)[:100]} and {str(other)[:100]}",
            hint="round the numbers, or convert them to floats",
        ) from error
    return Decimal("NaN") if result.is_nan() else result


def _divided(value: Decimal, divisor: int) -> Decimal:
    """Return the quotient, rounded to the digits of `value`, but to at least 28 digits, which is Python's default."""
    digits = max(28, len(value.as_tuple().digits))
    wide = decimal.Context(prec=digits, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[])
    return wide.divide(value, divisor)


def _sum_of_floats(one: Any, other: Any) -> Any:
    """Return the exact sum of two states. At least one of them must be a sum of floats."""
    parts: list[float] = []
    rest: int | Fraction = 0
    for state in (one, other):
        if type(state) is float:
            parts.append(state)
        elif type(state) is complex:
            parts += (state.real, state.imag)
        elif type(state) is ExactSum:
            parts += state.parts
            rest += state.rest
        elif type(state) is int and -WHOLE <= state <= WHOLE:
            parts.append(float(state))
        else:
            rest += state
    return exact_state(parts, rest)


def _sum_of_pairs(one: float | complex, other: float | complex) -> Any:
    """Return the sum of two pairs, or None if no pair is exact. A float is a pair whose second part is zero."""
    high, middle = two_sum(one.real, other.real)
    low, lowest = two_sum(one.imag, other.imag)
    middle, lower = two_sum(middle, low)
    if lowest != 0.0 or lower != 0.0:
        return None
    high, low = two_sum(high, middle)
    if low == 0.0:
        return high
    return complex(high, low) if math.isfinite(low) else None


def exact_state(parts: list[float], rest: int | Fraction = 0) -> Any:
    """Return the state of `sum(parts) + rest`."""
    found: list[float] = []
    remaining = list(parts)
    try:
        while total := math.fsum(remaining):
            if not math.isfinite(total):
                return math.nan if math.isnan(total) else total
            found.append(total)
            remaining.append(-total)
    except ValueError:  # there are infinities with both signs
        return math.nan
    except OverflowError:
        infinite = sum(part for part in parts if not math.isfinite(part))
        if infinite:
            return math.nan if math.isnan(infinite) else infinite
        rest += sum(map(Fraction, parts))
        return ExactSum((), rest) if rest else 0.0
    if rest or len(found) > 2:
        return ExactSum(tuple(found), rest)
    if found:
        return complex(*found) if len(found) == 2 else found[0]
    # As in IEEE 754, the sum is negative zero only if all values are negative zero.
    only_negative_zeros = bool(parts) and all(part == 0.0 and math.copysign(1.0, part) < 0 for part in parts)
    return -0.0 if only_negative_zeros else 0.0


def _ratio(state: Any) -> tuple[int, int]:
    """Return the numerator and denominator of a finite sum of integers, floats and fractions."""
    if type(state) is complex:
        over, under = state.real.as_integer_ratio()
        more, common = state.imag.as_integer_ratio()  # the second part of a pair has the larger denominator
        return over * (common // under) + more, common
    if type(state) is not ExactSum:
        numerator, denominator = state.as_integer_ratio()
        return int(numerator), int(denominator)
    ratios = [part.as_integer_ratio() for part in state.parts]
    common = max([under for _, under in ratios], default=1)  # the denominators of floats are powers of two
    total = sum([over * (common // under) for over, under in ratios])
    if not state.rest:
        return total, common
    over, under = state.rest.as_integer_ratio()
    return total * under + over * common, common * under


def _quotient(numerator: int, denominator: int) -> float:
    """Return the float nearest to the quotient, which may be an infinity."""
    try:
        return numerator / denominator  # Python rounds quotients of integers correctly
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def _complex_sum(state: Any) -> ComplexSum:
    return state if type(state) is ComplexSum else ComplexSum(state, 0.0)


def whole_state(state: Any) -> int:
    """Return the state of a sum of integers that were added as floats."""
    numerator, _ = _ratio(state)
    return numerator


def two_sum(one: Any, other: Any) -> tuple[Any, Any]:
    """Return the rounded sum and its error, which is exact (Knuth's TwoSum)."""
    total = one + other
    virtual = total - one
    return total, (one - (total - virtual)) + (other - virtual)


def square_and_error(value: Any) -> tuple[Any, Any]:
    """Return the rounded square and its error, which is exact (Veltkamp's splitting, Dekker's product)."""
    square = value * value
    scaled = value * 134217729.0  # 2**27 + 1: the difference has the upper 26 bits
    high = scaled - (scaled - value)
    low = value - high
    return square, ((high * high - square) + 2.0 * high * low) + low * low
