"""Exact means and deviations of large arrays, which depend on neither the order nor the division of the numbers.

`values + anchor - anchor` rounds all values of a piece to multiples of one power of two. The power is chosen so that
every sum of these multiples has at most 53 bits, so that NumPy adds them without an error, in any order. The remainders
are added in the next round. Sums of pieces are columns of floats, which are added in the same way.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyhands.numerics.exact_sums import (
    LARGE_ROOT,
    SMALL_ROOT,
    WHOLE,
    add_sums,
    exact_state,
    mean_of,
    square_and_error,
    square_of,
    variance_of,
)

_PIECE = 2**16  # numbers that are added at a time: they fit into the CPU's cache

_MOST_COLUMNS = 64  # the columns of sums are joined when there are more


class ExactStatistics:
    """Adds the numbers of channels. channels: how many. Several arrays of this length must fit in memory.

    count, missing: the numbers of each channel that are not NaN, and those that are, [channels].
    """

    def __init__(self, channels: int) -> None:
        self.count = np.zeros(channels, np.int64)
        self.missing = np.zeros(channels, np.int64)
        self._sums, self._squares = _Sums(channels), _Sums(channels)
        self._infinite = np.zeros((2, channels), bool)  # by sign

    def add(self, values: NDArray[Any]) -> None:
        """Add numbers, [numbers, channels, more numbers]."""
        if values.shape[1] == 1:
            flat = values.reshape(1, 1, -1)
            for start in range(0, flat.shape[2], _PIECE):
                self._add(flat[:, :, start : start + _PIECE])
            return
        step = max(1, _PIECE // max(1, values.shape[1] * values.shape[2]))
        for start in range(0, len(values), step):
            self._add(values[start : start + step])

    def _add(self, values: NDArray[Any]) -> None:
        with np.errstate(invalid="ignore"):  # signaling NaN
            numbers: NDArray[np.float64] = values.astype(np.float64)
        is_rare = np.zeros(1, bool)
        if values.dtype.kind == "f":
            unknown = np.isnan(numbers)
            if unknown.any():
                self.missing += unknown.sum(axis=(0, 2))
                self.count -= unknown.sum(axis=(0, 2))
                numbers[unknown] = 0.0
            if values.dtype.itemsize == 8:
                sizes = np.abs(numbers)
                is_rare = ((sizes >= LARGE_ROOT) | (sizes <= SMALL_ROOT)) & (numbers != 0.0)
            else:
                is_rare = np.isinf(numbers)
        elif values.dtype.itemsize == 8:
            is_rare = np.abs(numbers) >= WHOLE  # the next integer is rounded to WHOLE
        self.count += values.shape[0] * values.shape[2]
        if is_rare.any():
            self._add_rare(values, is_rare)
            numbers[is_rare] = 0.0
        self._sums.add(numbers)
        squares, errors = square_and_error(numbers)
        self._squares.add(squares)
        if errors.any():
            self._squares.add(errors)

    def _add_rare(self, values: NDArray[Any], is_rare: NDArray[np.bool_]) -> None:
        """Add infinities, and numbers whose squares floats can't hold exactly."""
        for row, channel, inner in np.argwhere(is_rare).tolist():
            value = values[row, channel, inner].item()
            if isinstance(value, float) and math.isinf(value):
                self._infinite[int(value > 0), channel] = True
            else:
                self._sums.add_state(channel, value)
                self._squares.add_state(channel, square_of(value))

    def results(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (means, deviations), [channels]: the exact mean, rounded once, and the root of the exact variance,
        rounded once. The deviation divides by the count. Both are NaN for a channel without numbers.
        """
        means, deviations = np.full(len(self.count), np.nan), np.full(len(self.count), np.nan)
        sums, squares = self._sums.states(), self._squares.states()
        for channel, count in enumerate(self.count.tolist()):
            negative, positive = self._infinite[:, channel].tolist()
            if negative or positive:
                means[channel] = np.nan if negative and positive else np.inf if positive else -np.inf
            elif count:
                means[channel] = mean_of(sums[channel], count)
                deviations[channel] = math.sqrt(variance_of(sums[channel], squares[channel], count, count))
        return means, deviations


class _Sums:
    """The exact sums of channels: columns of floats, [channels], and states of rare numbers (see `exact_sums`)."""

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._columns: list[NDArray[np.float64]] = []
        self._rare: dict[int, Any] = {}

    def add(self, values: NDArray[np.float64]) -> None:
        """Add finite numbers, [numbers, channels, more numbers]."""
        self._columns += _partial_sums(values)
        if len(self._columns) > _MOST_COLUMNS:
            self._columns = self._joined()

    def _joined(self) -> list[NDArray[np.float64]]:
        return _partial_sums(np.array(self._columns)[:, :, np.newaxis])

    def add_state(self, channel: int, state: Any) -> None:
        """Add a number to one channel."""
        self._rare[channel] = add_sums(self._rare.get(channel, 0), state)

    def states(self) -> list[Any]:
        """Return the state of each channel's sum."""
        columns = np.array((self._joined() if self._columns else []) or [np.zeros(self._channels)])
        found = [exact_state(parts) for parts in columns.T.tolist()]
        for channel, state in self._rare.items():
            found[channel] = add_sums(found[channel], state)
        return found


def _partial_sums(values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return columns of floats, [channels], whose exact sum is that of `values`, [numbers, channels, more numbers]."""
    columns = []
    added = values.shape[0] * values.shape[2]
    while largest := max(float(values.max()), -float(values.min())) if values.size else 0.0:
        # |values| < 2**exponent, and a sum of `added` values has `(added - 1).bit_length()` more bits. Subnormal
        # numbers are multiples of 2**-1074.
        exponent = math.frexp(largest)[1] + max(1, (added - 1).bit_length() - 1)
        anchor = math.ldexp(1.5, max(exponent, -1022))
        multiples = values + anchor
        multiples -= anchor
        values = values - multiples
        columns.append(multiples.sum(axis=(0, 2)))
    return columns
