"""Windows of consecutive rows, which span neither a gap in time, nor two groups, nor the border of a part."""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from manyhands.errors import ConfigError, DataError
from manyhands.options import real_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOLERANCE = 0.01  # of a step: times in floats are not exact

_ATTOSECONDS = {
    **{unit: seconds * 10**18 for unit, seconds in (("W", 604_800), ("D", 86_400), ("h", 3600), ("m", 60))},
    **{unit: 10 ** (18 - 3 * number) for number, unit in enumerate(("s", "ms", "us", "ns", "ps", "fs", "as"))},
}


class LeftOut(NamedTuple):
    """The numbers of windows that were left out, by reason.

    gaps: windows that would hold a missing step. groups: windows that would span two groups. split: windows that start
    in this part and would end beyond it.
    """

    gaps: int
    groups: int
    split: int


class Gap(NamedTuple):
    """A gap in time. row: the first row after it. missing: the number of steps that are missing."""

    row: int
    missing: int


class Windows:
    """The windows of `length` rows of a part of the data, in the order of their first rows.

    segments: ranges [start, stop) of rows. A window lies in one of them.
    """

    def __init__(self, segments: Sequence[tuple[int, int]], length: int, left_out: LeftOut) -> None:
        self.segments = [(start, stop) for start, stop in segments if stop - start >= length]
        self.left_out = left_out
        self._ends = list(accumulate(stop - start - length + 1 for start, stop in self.segments))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def first_row(self, index: int) -> int:
        """Return the first row of a window."""
        number = bisect_right(self._ends, index)
        return self.segments[number][0] + index - (self._ends[number - 1] if number else 0)


def find_windows(
    ranges: Sequence[tuple[int, int]], rows: int, length: int, borders: NDArray[np.intp], gaps: Sequence[Gap]
) -> Windows:
    """Return the windows of a part.

    ranges: the rows of the part, as ascending ranges [start, stop), which are not adjacent. rows: the number of all
    rows. borders: the first row of each group except the first, ascending. gaps: the gaps inside groups, ascending.
    """
    gap_rows = np.array([gap.row for gap in gaps], np.int64)
    missing = np.concatenate(([0], np.cumsum([gap.missing for gap in gaps]))) if gaps else np.zeros(1, np.int64)
    segments: list[tuple[int, int]] = []
    by_gaps = by_groups = by_split = 0
    for start, stop in ranges:
        cuts = borders[np.searchsorted(borders, start, "right") : np.searchsorted(borders, stop)]
        timelines = list(pairwise([start, *cuts.tolist(), stop]))
        kept = 0
        for first, end in timelines:
            low, high = np.searchsorted(gap_rows, first, "right"), np.searchsorted(gap_rows, end)
            found = list(pairwise([first, *gap_rows[low:high].tolist(), end]))
            steps = end - first + int(missing[high] - missing[low])
            by_gaps += _count(steps, length) - sum(_count(stop - start, length) for start, stop in found)
            kept += _count(end - first, length)
            segments += found
        by_groups += _count(stop - start, length) - kept
        # Windows that start in the last segment of the part, and would be windows without the border of the part.
        beyond = [rows]
        for ends in (borders, gap_rows):
            after = np.searchsorted(ends, stop)  # the first end that is not inside the part
            beyond += ends[after : after + 1].tolist()
        by_split += max(0, min(stop - 1, min(beyond) - length) - max(segments[-1][0], stop - length + 1) + 1)
    return Windows(segments, length, LeftOut(by_gaps, by_groups, by_split))


def _count(steps: int, length: int) -> int:
    return max(0, steps - length + 1)


def borders_of(groups: NDArray[Any]) -> NDArray[np.intp]:
    """Return the rows whose group differs from that of the row before."""
    return np.flatnonzero(groups[1:] != groups[:-1]) + 1


def common_step(times: NDArray[Any], borders: NDArray[np.intp]) -> Any:
    """Return the median of the positive differences between neighbouring times of a group, or None without any."""
    steps = np.delete(np.diff(times), borders - 1)
    steps = np.sort(steps[steps > np.zeros(1, steps.dtype)])
    return steps[(len(steps) - 1) // 2] if len(steps) else None


def step_of(step: Any, times: np.dtype[Any]) -> Any:
    """Return the step in the unit of the times. Raises ConfigError."""
    try:
        if times.kind in "Mm":
            found = np.timedelta64(step)
            if np.datetime_data(found.dtype)[0] == "generic":
                raise TypeError("a step of datetimes needs a unit, such as datetime.timedelta(hours=6)")
            is_positive = found > np.timedelta64(0, "s")
        else:
            found = times.type(step)
            if found != step:
                raise ValueError("the times are whole numbers")
            is_positive = found > 0
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the step of the times can't be used: {error}", got=repr(step)) from error
    if not is_positive:
        raise ConfigError("the step of the times can't be used: it is not positive", got=repr(step))
    return found


def first_at(times: NDArray[Any], time: Any) -> int:
    """Return the first row whose time is `time` or later. times: ascending. Raises ConfigError.

    Comparisons are between Python's integers and floats, which are exact. NumPy would round or wrap one of the numbers.
    """
    try:
        if times.dtype.kind in "mM":
            exact: Callable[[Any], Any] = _attoseconds
            sought: float | None = _attoseconds(_moment(time, times.dtype.kind))
        else:
            exact, sought = operator.methodcaller("item"), real_number(time)
            if sought is None or sought != sought:
                raise ValueError("it is not a number")
        return bisect_left(range(len(times)), sought, key=lambda row: exact(times[row]))
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the time to split at can't be read: {error}", got=repr(time)) from error


def _moment(time: Any, kind: str) -> Any:
    """Return a datetime64, or a timedelta64 for kind "m". Raises ValueError."""
    if isinstance(time, datetime) and time.tzinfo is not None:
        time = time.astimezone(UTC).replace(tzinfo=None)
    found = np.datetime64(time) if kind == "M" else np.timedelta64(time)
    if np.isnat(found):
        raise ValueError("it is NaT")
    return found.astype("datetime64[D]") if found.dtype in ("datetime64[Y]", "datetime64[M]") else found


def _attoseconds(time: Any) -> int:
    unit, count = np.datetime_data(time.dtype)
    if unit not in _ATTOSECONDS:
        raise ValueError(f"its unit is {unit}, which has no fixed length")
    number: int = int(time.astype(np.int64)) * count * _ATTOSECONDS[unit]
    return number


def check_increasing(times: NDArray[Any], borders: NDArray[np.intp], where: str) -> None:
    """Raise DataError for a time inside a group that is not after the time before it."""
    steps = np.diff(times)
    inside = _inside(steps, borders)
    back = np.flatnonzero(inside & ~(steps > np.zeros(1, steps.dtype)))
    if len(back):
        row = int(back[0])
        raise DataError(
            "times do not increase from row to row",
            where=f"{where}, rows {row + 1} and {row + 2}",
            got=f"{times[row]} and {times[row + 1]}",
            hint="sort the records by time before they are written, or name the column that separates several series: "
            "group=...",
        )


def find_gaps(times: NDArray[Any], step: Any, borders: NDArray[np.intp]) -> list[Gap]:
    """Return the gaps inside groups. times: increasing inside a group. step: more than zero."""
    steps = np.diff(times)
    inside = _inside(steps, borders)
    with np.errstate(over="ignore"):
        ratios = steps / step
    off = np.flatnonzero(inside & (np.abs(ratios - 1) > (_TOLERANCE if times.dtype.kind == "f" else 0)))
    return [Gap(row + 1, max(1, round(np.ceil(float(ratios[row]) - _TOLERANCE)) - 1)) for row in off.tolist()]


def _inside(steps: NDArray[Any], borders: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return for each step whether it is inside a group."""
    inside = np.ones(len(steps), bool)
    inside[borders - 1] = False
    return inside


def chosen_groups(values: NDArray[Any], borders: NDArray[np.intp], keep: Any) -> list[tuple[int, int]]:
    """Return the rows of the groups for which `keep` is true, as ranges. keep: a set of values."""
    edges = [0, *borders.tolist(), len(values)]
    found: list[tuple[int, int]] = []
    for start, stop in pairwise(edges):
        if start < stop and values[start].item() in keep:
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            else:
                found.append((start, stop))
    return found
