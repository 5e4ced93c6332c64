"""ArrayFile: arrays of records as a data set, one record or one window of consecutive records at a time."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from manyhands.data.array_format import Column, Layout, MappedArrays, map_arrays
from manyhands.data.output_files import OutputFiles, find_output
from manyhands.data.token_format import MANIFEST
from manyhands.data.windows import (
    Gap,
    LeftOut,
    Windows,
    borders_of,
    check_increasing,
    chosen_groups,
    common_step,
    find_gaps,
    find_windows,
    first_at,
    step_of,
)
from manyhands.errors import ConfigError, DataError
from manyhands.numerics.exact_statistics import ExactStatistics
from manyhands.options import real_number, whole_number
from manyhands.storage.location import is_local

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ArrayStatistics:
    """Statistics of a column, exact: the same for any division into files, and any order of the rows.

    column: its name. ranges: the rows that the statistics cover, as ranges [start, stop), counted over all files.
    times: the first and the last time of these rows, if there is a column of times. mean, deviation: floats, or arrays
    [channels]; the deviation divides by the count. count, missing: how many numbers were not NaN, and how many were.
    """

    column: str
    ranges: tuple[tuple[int, int], ...]
    times: tuple[Any, Any] | None
    mean: Any
    deviation: Any
    count: Any
    missing: Any


@dataclass(eq=False)
class ArrayFile(Dataset[Any]):
    """Rows, or windows of rows, of a folder that `Dataset.write(format="arrays")` wrote.

    path: the folder. columns: the columns of an item (default: all). An item is a dict of tensors; if `columns` is one
    name, it is a tensor. length: without it, an item is a row, and its tensors have the shapes of the columns. With it,
    an item is a window of `length` consecutive rows, and its tensors have the shape [length, ...]. Datetimes and time
    differences are tensors of int64 in the unit of the column.

    time: a column of numbers or datetimes that increases from row to row. A window never spans a gap, which is a
    difference of times other than `step` (default: the median of the differences). gaps: "leave out" leaves out the
    windows that would hold a missing step, "error" raises DataError for the first gap. group: a column of numbers, such
    as an episode. A window never spans two values of it, and times may start again.

    rows: use only these rows, (start, stop), counted over all files. share: use only this share of the groups, such as
    (0.0, 0.8), in an order that depends on `seed` and the groups' values. Use `split` to get two parts.

    The files are mapped into memory, so the workers of a host share one copy. The recipe decides the order of samples,
    so an ArrayFile has no state. Raises DataError if the folder has no arrays, incomplete files or no window. Raises
    ConfigError for invalid arguments.
    """

    path: str | Path
    columns: str | Sequence[str] | None = None
    length: int | None = None
    time: str | None = None
    step: Any = None
    gaps: str = "leave out"
    group: str | None = None
    rows: tuple[int | None, int | None] | None = None
    share: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.path = str(self.path)
        # The digest must not depend on whether lists or tuples, or numbers of NumPy or Python were given.
        self.columns = tuple(self.columns) if isinstance(self.columns, list) else self.columns
        if isinstance(self.rows, (list, tuple)) and len(self.rows) == 2:
            self.rows = (_plain(self.rows[0]), _plain(self.rows[1]))
        self.length, self.seed = _plain(self.length), _plain(self.seed)
        _check_arguments(self)
        self._output = _output(self.path)
        self._files = [_mapped(self._output.folder / file["name"], file["bytes"]) for file in self._output.listed]
        self._layout = _one_layout(self._output.folder, self._files)
        self._starts = list(accumulate((file.layout.rows for file in self._files), initial=0))
        self.total_rows: int = self._starts[-1]
        self._names = _selected(self.columns, self._layout, self.path)
        self._borders = borders_of(self._scalars(self.group)) if self.group else np.empty(0, np.intp)
        self.time_gaps, self._windows = self._find_windows()
        if not len(self):
            raise DataError(
                "there are too few rows for one window",
                where=self.path,
                expected=f"{self.length or 1} consecutive rows without a gap, in one group and one part",
                got=f"{self.total_rows} rows; {self.report}",
                hint="use a smaller length, another part, or more data",
            )

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} is outside of an array file of {len(self)} items")
        start = self._windows.first_row(index)
        found = {name: self._tensor(name, start, start + (self.length or 1)) for name in self._names}
        if self.length is None:
            found = {name: tensor[0] for name, tensor in found.items()}
        return found[self.columns] if isinstance(self.columns, str) else found

    def first_row(self, index: int) -> int:
        """Return the number of the first row of an item, counted over all files."""
        return self._windows.first_row(range(len(self))[index])

    @property
    def left_out(self) -> LeftOut:
        """Return how many windows were left out because of gaps in time, borders between groups, or the split."""
        return self._windows.left_out

    @property
    def report(self) -> str:
        """Return how many windows there are, and how many were left out and why, in one line."""
        gaps, groups, split = self.left_out
        reasons = (
            (gaps, f"would hold a missing step ({len(self.time_gaps)} gap{'s' * (len(self.time_gaps) != 1)})"),
            (groups, "would span two groups"),
            (split, "would end beyond this part"),
        )
        left = "; ".join(f"{count:,} {reason}" for count, reason in reasons if count)
        return f"{len(self):,} windows of {self.length or 1} rows; left out: {left or 'none'}"

    def split(
        self, *, row: int | None = None, time: Any = None, share: float | None = None
    ) -> tuple[ArrayFile, ArrayFile]:
        """Divide the rows into two parts, and return an ArrayFile for each. No row is in both.

        row: the first row of the second part, counted over all files. time: the second part starts with the first row
        that has this time or a later one in the column of times: a number, or a datetime, date or text of one. share:
        the share of the groups that are in the first part, between 0 and 1. Raises ConfigError unless exactly one of
        them is given.
        """
        given = {name: value for name, value in (("row", row), ("time", time), ("share", share)) if value is not None}
        if len(given) != 1:
            raise ConfigError("split needs one of row, time and share", got=", ".join(given) or "none of them")
        low, high = self.share or (0.0, 1.0)
        if share is not None:
            part = real_number(share)
            if part is None or not 0 < part < 1:
                raise ConfigError("the share to split at is out of range", expected="between 0 and 1", got=repr(share))
            middle = low + (high - low) * part
            return replace(self, share=(low, middle)), replace(self, share=(middle, high))
        first = whole_number(row) if row is not None else self._row_at(time)
        start, stop = _range_of(self.rows, self.total_rows)
        if self.share is not None or first is None or not start < first < stop:
            raise ConfigError(
                "the data can't be split here",
                expected=f"a row between {start} and {stop}, and no share",
                got=", ".join(f"{name}={value!r}" for name, value in given.items()),
            )
        return replace(self, rows=(start, first)), replace(self, rows=(first, stop))

    def statistics(self, column: str, axis: int | Sequence[int] | None = None) -> ArrayStatistics:
        """Return the exact mean and deviation of a column, over the rows of this part. NaN are counted as missing.

        axis: an axis of a row's array, or several of them, such as 0 for the channels of [channels, height, width].
        There is a result for each index of these axes. By default, there is one result. Reads the complete column.

        Raises DataError if there is no such column of numbers, and ConfigError for an axis that the arrays lack.
        """
        kind = self._column(column)
        axes = _axes_of(axis, len(kind.shape))
        if kind.dtype.kind in "mM":
            raise DataError("a column has no numbers", where=str(self.path), got=f"{column}: {kind.kind}")
        kept = tuple(kind.shape[each] for each in axes)
        found = ExactStatistics(math.prod(kept))
        before, after = _other_axes(axes, len(kind.shape))
        order = [0, *(1 + each for each in (*before, *axes, *after))]
        inner = math.prod(kind.shape[each] for each in after)
        for start, stop in self._ranges:
            for rows in self._parts(column, start, stop, _STATISTICS_BYTES // max(1, kind.row_bytes)):
                if rows.size:
                    found.add(rows.transpose(order).reshape(-1, math.prod(kept), inner))
        means, deviations = found.results()
        shaped = [
            each.reshape(kept) if kept else each[0].item() for each in (means, deviations, found.count, found.missing)
        ]
        return ArrayStatistics(column, tuple(self._ranges), self._times_of(), *shaped)

    @property
    def digest(self) -> str:
        """Return a hash of the files' checksums and of the arguments, without the path. Runs record it."""
        arguments = {each.name: repr(getattr(self, each.name)) for each in fields(self) if each.name != "path"}
        return hashlib.sha256(f"{self._output.digest} {json.dumps(arguments)}".encode()).hexdigest()

    def verify(self) -> None:
        """Read all files and check their SHA-256 checksums. Raises DataError, which names a file that has changed."""
        changed = self._output.changed()
        if changed is not None:
            raise DataError(
                "an array file has changed since it was written",
                where=str(changed[0]),
                expected=f"SHA-256 {changed[1]}",
                got=changed[2],
                hint="write the data again, or copy them again",
            )

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling a memory map would copy all arrays, so a loader process opens the files itself.
        return type(self), tuple(getattr(self, each.name) for each in fields(self))

    def _tensor(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a column as a tensor of its own.

        Copy the rows: a tensor that shares the map could be written to, and reading it after the file was truncated
        would kill the process.
        """
        column = self._column(name)
        kind = _TORCH.get(column.kind, torch.int64)
        found = torch.empty((stop - start, *column.shape), dtype=kind)
        into, filled = found.numpy(), 0
        for rows in self._parts(name, start, stop, stop - start):
            into[filled : filled + len(rows)] = rows if column.kind in _TORCH else rows.view("<i8")
            filled += len(rows)
        return found

    def _parts(self, name: str, start: int, stop: int, most: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop) of a column as arrays of at most `most` rows, in the map."""
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            inside = start - self._starts[number]
            rows = self._files[number].rows(name, inside, min(stop - self._starts[number], inside + max(1, most)))
            yield rows
            start += len(rows)
            number += start == self._starts[number + 1]

    def _column(self, name: str) -> Column:
        return self._layout.columns[_index_of(name, self._layout, str(self.path))]

    def _scalars(self, name: str) -> NDArray[Any]:
        """Return a column of times or groups. Raises DataError if it has arrays, NaN or NaT."""
        column = self._column(name)
        if column.shape or column.kind == "bool":
            raise DataError(
                "a column has no numbers or times, one in each row",
                where=str(self.path),
                got=f"{name}: {column.kind} {list(column.shape)}",
                hint="choose another column for time and group, or write one",
            )
        parts = [rows for file in self._files for rows in file.all_rows(name)]
        found = np.concatenate(parts)
        unknown = np.flatnonzero(found != found)
        if len(unknown):
            what = "a time or group is missing (NaN or NaT)"
            raise DataError(what, where=f"{self.path}, row {unknown[0] + 1}, column {name!r}")
        return found.astype(np.int64) if found.dtype.kind == "u" else found.astype(found.dtype.newbyteorder("="))

    def _find_windows(self) -> tuple[list[Gap], Windows]:
        self._ranges = self._find_ranges()
        found: list[Gap] = []
        if self.time is not None:
            found = self._find_gaps(self._scalars(self.time))
        windows = find_windows(self._ranges, self.total_rows, self.length or 1, self._borders, found)
        return found, windows

    def _find_ranges(self) -> list[tuple[int, int]]:
        if self.share is None or self.group is None:
            return [_range_of(self.rows, self.total_rows)]
        values = self._scalars(self.group)
        ordered = sorted(np.unique(values).tolist(), key=lambda value: _rank(self.seed, value))
        low, high = (round(each * len(ordered)) for each in self.share)
        return chosen_groups(values, self._borders, set(ordered[low:high]))

    def _find_gaps(self, times: NDArray[Any]) -> list[Gap]:
        check_increasing(times, self._borders, str(self.path))
        step = common_step(times, self._borders) if self.step is None else step_of(self.step, times.dtype)
        if step is None:
            return []
        found = find_gaps(times, step, self._borders)
        if found and self.gaps == "error":
            row = found[0].row
            raise DataError(
                "there is a gap in time",
                where=f"{self.path}, rows {row} and {row + 1}",
                expected=f"a step of {step}",
                got=f"{times[row - 1]} and {times[row]}",
                hint='fill the gap, or use gaps="leave out" to leave out the windows that would hold it',
            )
        return found

    def _row_at(self, time: Any) -> int:
        """Return the first row at this time or later. Raises ConfigError."""
        if self.time is None:
            raise ConfigError(
                "a time to split at needs a column of times", got=repr(time), hint="use ArrayFile(time=...)"
            )
        times = self._scalars(self.time)
        if np.any(times[1:] < times[:-1]):
            raise ConfigError("the data can't be split at a time, because times start again", hint="split by share")
        return first_at(times, time)

    def _times_of(self) -> tuple[Any, Any] | None:
        if self.time is None or not self._ranges:
            return None
        times = self._scalars(self.time)
        parts = [times[start:stop] for start, stop in self._ranges]
        return min(part.min() for part in parts), max(part.max() for part in parts)


_STATISTICS_BYTES = 2**24  # of rows that are read at a time

_GAPS = ("leave out", "error")

_TORCH = {
    "bool": torch.bool,
    **{f"int{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
}


def _plain(number: Any) -> Any:
    """Return an integer of NumPy or torch as one of Python, and any other value as it is."""
    whole = whole_number(number)
    return number if whole is None else whole


def _check_arguments(data: ArrayFile) -> None:
    """Check the arguments that do not depend on the files. Raises ConfigError."""
    if data.length is not None and (whole_number(data.length) or 0) < 1:
        raise ConfigError("length is not an integer of at least 1", got=repr(data.length))
    if data.gaps not in _GAPS:
        raise ConfigError(
            "unknown treatment of gaps in time", expected=" or ".join(map(repr, _GAPS)), got=repr(data.gaps)
        )
    if data.step is not None and data.time is None:
        raise ConfigError("a step needs a column of times", got=f"step={data.step!r}", hint="use ArrayFile(time=...)")
    if whole_number(data.seed) is None:
        raise ConfigError("seed is not an integer", got=repr(data.seed)[:200])
    if data.share is None:
        return
    share = data.share
    is_valid = isinstance(share, (tuple, list)) and len(share) == 2 and 0 <= share[0] < share[1] <= 1
    if not is_valid or data.group is None or data.rows is not None:
        raise ConfigError(
            "a share of the groups can't be chosen",
            expected="two numbers from 0 to 1 in ascending order, a column `group`, and no `rows`",
            got=f"share={share!r}, group={data.group!r}, rows={data.rows!r}",
        )
    data.share = (float(share[0]), float(share[1]))


def _output(path: str) -> OutputFiles:
    """Return the array files of a folder. Raises DataError."""
    if not is_local(path):
        raise DataError(
            "array files are mapped into memory, so they must be on a disk", where=path, hint="copy them to a disk"
        )
    found = find_output([Path(path)], MANIFEST)
    if found is None or not found.listed:
        raise DataError(
            "there are no arrays here",
            where=str(Path(path).absolute()),
            expected=f"a folder with {MANIFEST} (written when the output is complete) and at least one record",
            hint="write them first: Dataset.write(folder, format='arrays')"
            + ("" if Path(path).is_absolute() else "; a relative path is relative to the working directory"),
        )
    if not found.are_plain:
        raise DataError(
            "the manifest of arrays names something that is not a file of its folder",
            where=str(found.folder / MANIFEST),
            hint="write the data again; don't use a folder that you do not trust",
        )
    return found


def _mapped(path: Path, num_bytes: int) -> MappedArrays:
    try:
        if path.stat().st_size != num_bytes:
            raise DataError(
                "the size of an array file has changed since it was written",
                where=str(path),
                expected=f"{num_bytes:,} bytes",
                got=f"{path.stat().st_size:,}",
                hint="write the data again, or copy them again",
            )
        return map_arrays(str(path))
    except OSError as error:
        raise DataError(f"an array file can't be read: {error.strerror or error}", where=str(path)) from error


def _one_layout(folder: Path, files: Sequence[MappedArrays]) -> Layout:
    """Return the layout of the first file. Raises DataError if a file has other columns."""
    first = files[0].layout
    for file in files:
        if file.layout.columns != first.columns:
            raise DataError(
                "array files of one folder have different columns",
                where=str(folder),
                expected=_described(first),
                got=_described(file.layout),
                hint="write the data again",
            )
    return first


def _described(layout: Layout) -> str:
    return ", ".join(f"{column.name}: {column.kind} {list(column.shape)}" for column in layout.columns)


def _index_of(name: Any, layout: Layout, path: str) -> int:
    names = [column.name for column in layout.columns]
    if name not in names:
        raise DataError(
            f"there is no column {name!r}", where=path, expected=f"one of {', '.join(names)}", got=repr(name)
        )
    return names.index(name)


def _selected(columns: str | Sequence[str] | None, layout: Layout, path: str) -> list[str]:
    names = [columns] if isinstance(columns, str) else columns
    if names is not None and not len(names):
        raise ConfigError("columns can't be selected", expected="at least one column", got=repr(columns))
    if names is None:
        return [column.name for column in layout.columns]
    return [layout.columns[_index_of(name, layout, path)].name for name in names]


def _axes_of(axis: int | Sequence[int] | None, dimensions: int) -> tuple[int, ...]:
    """Return the axes of a row's array for which there are separate results. Raises ConfigError."""
    axes = () if axis is None else tuple(axis) if isinstance(axis, Sequence) else (axis,)
    found = tuple(each + dimensions if each < 0 else each for each in axes)
    if not all(0 <= each < dimensions for each in found) or len(set(found)) < len(found):
        raise ConfigError("the arrays lack an axis", expected=f"axes of {dimensions} dimensions", got=f"axis={axis!r}")
    return found


def _other_axes(axes: tuple[int, ...], dimensions: int) -> tuple[list[int], list[int]]:
    """Return the other axes, those before and those after `axes`. If all axes stay in order, nothing is copied."""
    others = [each for each in range(dimensions) if each not in axes]
    if not axes:
        return [], others
    if list(axes) != list(range(axes[0], axes[-1] + 1)):
        return others, []
    return [each for each in others if each < axes[0]], [each for each in others if each > axes[0]]


def _range_of(rows: Any, total: int) -> tuple[int, int]:
    """Return the rows that are used. Raises ConfigError."""
    try:
        start, stop = (None, None) if rows is None else rows
        low, high = (default if each is None else operator.index(each) for each, default in ((start, 0), (stop, total)))
    except (TypeError, ValueError):
        low, high = 0, -1
    if not 0 <= low < high <= total:
        raise ConfigError(
            "the rows are not in the data", expected=f"(start, stop) in 0 to {total}", got=f"rows={rows!r}"
        )
    return low, high


def _rank(seed: int, value: Any) -> bytes:
    """Return the key that puts groups into an order that depends on their values alone."""
    return hashlib.blake2b(f"{seed} {value!r}".encode()).digest()
