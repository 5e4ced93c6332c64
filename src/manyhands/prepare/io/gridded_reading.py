"""Reads a split of a zarr store or a netCDF file as tables with one row per step, whose columns hold arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.errors import DataError
from manyhands.prepare.gridded.coordinates import calendar_of, decode_coordinate
from manyhands.prepare.gridded.decoding import (
    MissingIntegers,
    as_common_type,
    decoded,
    missing_values,
    reading_attributes,
)
from manyhands.prepare.gridded.description import coordinate_numbers, slab_of
from manyhands.prepare.gridded.sources import Source, Variable, open_source
from manyhands.prepare.io.gridded_input import slab_version
from manyhands.prepare.io.listing import ArrayRead, Split
from manyhands.prepare.records.chunks import TABLE_CHUNK_BYTES
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk
from manyhands.storage.files import join_path

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_gridded(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read the steps of a split. The number of chunks that were never written is added to `bad.absent_chunks`.

    columns: the dimension of records, and the names of the variables.
    """
    from manyhands.prepare.records.numpy_form import table_of_columns

    read, end = split.arrays, split.end
    if read is None or end is None or columns is None:
        raise TypeError("a split of arrays has no description")
    path = split.path.rpartition("/")[0] if split.format == "zarr" else split.path
    with open_source(path, split.format) as source:
        names = [name for name in columns if name != read.record or name in source.variables]
        if read.version and slab_version(source, columns[1:], read.record, split.start, end) != read.version:
            raise _changed(path)
        absent: set[str] = set()
        rows = max(1, TABLE_CHUNK_BYTES // read.step_bytes)
        steps = read.unit * max(1, rows // read.unit)
        for start in range(split.start, end, steps):
            stop = min(start + steps, end)
            block = _Block(source, read, start, stop)
            arrays = {name: block.column(name) for name in names}
            if read.record not in arrays:
                arrays = {read.record: np.arange(read.before + start, read.before + stop), **arrays}
            absent |= {key for key, first in block.absent.items() if first >= split.start}
            for low in range(0, stop - start, rows):
                part = {name: array[low : low + rows] for name, array in arrays.items()}
                where = _locator(path, read.record, part[read.record])
                yield SourcedChunk(table_of_columns(part), where)
        bad.absent_chunks += len(absent)
        if read.version and slab_version(source, columns[1:], read.record, split.start, end) != read.version:
            raise _changed(path)


def _changed(path: str) -> DataError:
    return DataError(
        "a file has changed since it was listed",
        where=path,
        hint="run the job again when nothing writes to its input",
    )


def _locator(path: str, record: str, values: Any) -> Callable[[int], str]:
    return lambda index: f"{path}, {record}={values[index]}"


@dataclass
class _Block:
    """The steps `start` to `stop` of the variables of a source, decoded.

    absent: the keys of chunks that were never written, with the step of their first cell.
    """

    source: Source
    read: ArrayRead
    start: int
    stop: int

    def __post_init__(self) -> None:
        self.absent: dict[str, int] = {}

    def column(self, name: str) -> NDArray[Any]:
        """Return the values of a variable, an array [steps, ...]."""
        variable, record = self.source.variables[name], self.read.record
        slab = slab_of(variable, record, self.start, self.stop)
        self.source.absent.clear()
        stored = self.source.read(name, slab)
        absent_cells = self._note_absent(variable, slab)
        if absent_cells and name == record:
            coordinate_numbers(self.source, name)  # raises DataError unless the value may be equal to the fill value
        axis = variable.dims.index(record)
        if variable.dtype.kind not in "biuf":
            return np.array(decode_coordinate(stored, variable.attributes).tolist(), dtype=object)
        values = np.moveaxis(self._decoded(variable, stored, absent_cells), axis, 0)
        if variable.dims == (record,) and calendar_of(variable.attributes) is not None:
            return self._times(variable, values)
        wide = dict(self.read.types).get(name)
        try:
            return np.ascontiguousarray(values if wide is None else as_common_type(values, np.dtype(wide)))
        except MissingIntegers as error:
            raise self._integers(name, str(error)) from error

    def _times(self, variable: Variable, values: NDArray[Any]) -> NDArray[Any]:
        try:
            times = decode_coordinate(values, variable.attributes)
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"the times of {variable.name!r} can't be decoded: {error}",
                where=self.source.path,
                got=str(variable.attributes.get("units")),
            ) from error
        if times.dtype.kind == "M" and self.read.text_times and variable.name == self.read.record:
            times = np.datetime_as_string(times.astype("datetime64[us]"))
        return times if times.dtype.kind == "M" else np.array(times.tolist(), dtype=object)

    def _note_absent(self, variable: Variable, slab: tuple[slice, ...]) -> int:
        """Note the chunks that were never written, and return how many cells of the slab they have."""
        cells = 0
        if not self.source.absent:
            return cells
        for key, first in self.source.chunk_keys(variable.name, slab):
            if key not in self.source.absent:
                continue
            if self.read.absent == "error":
                raise DataError(
                    "a chunk of a zarr store was never written",
                    where=join_path(self.source.path, key),
                    expected="a file for each chunk, because of absent='error'",
                    hint="write the chunk, or use absent='fill', which reads the fill value and counts the chunk",
                )
            self.absent[key] = first[variable.dims.index(self.read.record)]
            inside = [
                max(0, min(at + unit, each.stop) - max(at, each.start))
                for at, unit, each in zip(first, variable.units or (), slab, strict=True)
            ]
            cells += int(np.prod(inside))
        return cells

    def _decoded(self, variable: Variable, stored: NDArray[Any], absent_cells: int) -> NDArray[Any]:
        attributes = reading_attributes(variable.attributes, stored.dtype, variable.fill, self.read.fill_value)
        # A fill value of 0 or NaN is not ambiguous.
        ambiguous = self.read.fill_value is None and variable.fill and variable.fill == variable.fill
        if ambiguous and not missing_values(stored.dtype, attributes):
            self._refuse_ambiguous(variable, stored, absent_cells)
        try:
            return decoded(stored, attributes, integers_as_floats=self.read.integers == "float")
        except MissingIntegers as error:
            raise self._integers(variable.name, str(error)) from error

    def _integers(self, name: str, what: str) -> DataError:
        return DataError(
            f"variable {name!r} has integers, and {what}",
            where=self.source.path,
            hint="leave it out with columns=[...]"
            if self.read.integers == "float"
            else "read it with integers='float', which gives floats with NaN, or leave it out with columns=[...]",
        )

    def _refuse_ambiguous(self, variable: Variable, stored: NDArray[Any], absent_cells: int) -> None:
        found = int((stored == variable.fill).sum())
        if found > absent_cells:
            raise DataError(
                f"variable {variable.name!r} holds its fill value {variable.fill}, which may mean missing values",
                where=self.source.path,
                expected="an attribute _FillValue or missing_value, if these values are missing",
                got=f"{found - absent_cells} such values",
                hint="use fill_value='missing' if they are missing, as xarray writes them, or fill_value='value'",
            )
