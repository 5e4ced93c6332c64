"""Cuts the arrays of records at the boundaries of a store's files, so that a shuffle can bring each piece to its file.

One task then writes a complete file (a chunk, or a shard), however the input is divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from manyhands.prepare.gridded.coordinates import key_of
from manyhands.prepare.gridded.layout import Grid, ZarrLayout, grid_of
from manyhands.prepare.gridded.values import stored_values
from manyhands.prepare.records.chunks import Chunk, records_of
from manyhands.prepare.records.functions import BadResult, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Piece(NamedTuple):
    """A part of a record's array that lies in one file.

    owner: the number of the file (see `Grid`). records: 1 for the first piece of a record, and otherwise 0. start,
    shape: the position in the file, and the shape. data: the values, as bytes, whose size the shuffle can estimate.
    """

    owner: int
    records: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class CutIntoPieces:
    """Replaces each record by its pieces. Raises BadResult for a record that does not fit the layout."""

    layout: ZarrLayout
    batched = False

    def apply(self, chunk: Chunk, partition: int, before: int) -> Chunk:
        grid = grid_of(self.layout)
        return [piece for record in records_of(chunk) for piece in _pieces_of(record, grid)]

    def describe(self) -> str:
        return f"cut into chunks of {', '.join(self.layout.dims)}"


def _pieces_of(record: Any, grid: Grid) -> Iterator[Piece]:
    layout = grid.layout
    if not isinstance(record, dict):
        raise BadResult(f"a record of a zarr store is a dict of coordinates and arrays, not a {type(record).__name__}")
    unknown = next((name for name in record if name not in layout.dims and name not in layout.record), None)
    if unknown is not None:
        raise BadResult(f"{unknown!r} of the record is neither a variable nor a dimension of records of the layout")
    first = {dim: _position(dim, record, grid) for dim in layout.record}
    count = 1
    for name in layout.dims:
        if record.get(name) is not None:
            block = _block(name, record[name], layout)
            start = [first.get(dim, 0) for dim in layout.dims[name]]
            _check_within(name, start, block.shape, layout)
            for piece in _cut(name, block, start, count, grid):
                yield piece
                count = 0
    if count:
        raise BadResult(f"the record has values of no variable of the layout: {', '.join(layout.dims)}")


def _position(dim: str, record: dict[Any, Any], grid: Grid) -> int:
    """Return the position of a record along a dimension."""
    if record.get(dim) is None:
        raise BadResult(f"the record has no value of {dim!r}, a dimension along which records are placed")
    value = record[dim]
    values = grid.values.get(dim)
    try:
        if isinstance(value, str) and values is not None and values.dtype.kind == "M":
            value = np.datetime64(value)
        found = grid.positions[dim].get(key_of(value))
    except (ValueError, TypeError) as error:
        raise BadResult(f"{dim!r} of the record is no coordinate: {error}") from error
    if found is None:
        extent = f"{grid.layout.sizes[dim]} values"
        if values is not None and len(values):
            extent += f" from {values[0]} to {values[-1]}"
        raise BadResult(
            f"{dim!r} of the record is {shown(value, 80)}, which is not a coordinate of the layout ({extent})"
        )
    return found


def _block(name: str, value: Any, layout: ZarrLayout) -> NDArray[Any]:
    """Return a variable's value of a record, with all dimensions of the variable, in the type of the store."""
    if np.ma.is_masked(value):
        raise BadResult(
            f"{name!r} of the record has masked values, which would be lost; fill them, for example with NaN"
        )
    try:
        array = np.asarray(value)
        stored = stored_values(array, np.dtype(layout.dtypes[name]), layout.packing.get(name))  # type: ignore[index]
    except ValueError as error:
        raise BadResult(f"{name!r} of the record can't be written: {error}") from error
    dims, record = layout.dims[name], layout.record
    if stored.ndim != len(dims):
        steps = tuple(index for index, dim in enumerate(dims) if dim in record)
        if stored.ndim != len(dims) - len(steps):
            raise BadResult(_wrong_shape(name, array.shape, layout))
        stored = np.expand_dims(stored, steps)
    for dim, size in zip(dims, stored.shape, strict=True):
        if dim not in record and size != layout.sizes[dim]:
            raise BadResult(_wrong_shape(name, array.shape, layout))
    return stored


def _wrong_shape(name: str, shape: tuple[int, ...], layout: ZarrLayout) -> str:
    inner = [dim for dim in layout.dims[name] if dim not in layout.record]
    expected = ", ".join(f"{dim} {layout.sizes[dim]}" for dim in inner) or "a single value"
    return f"{name!r} of the record has the shape {shape}; the layout expects {expected}"


def _check_within(name: str, start: list[int], shape: tuple[int, ...], layout: ZarrLayout) -> None:
    for dim, at, length in zip(layout.dims[name], start, shape, strict=True):
        if at + length > layout.sizes[dim]:
            raise BadResult(
                f"{name!r} of the record has {length} steps from position {at} of {dim!r}, which has only "
                f"{layout.sizes[dim]}"
            )


def _cut(name: str, block: NDArray[Any], start: list[int], count: int, grid: Grid) -> Iterator[Piece]:
    units = grid.layout.unit(name)
    spans = [
        range(at // unit, -(-(at + length) // unit)) if length else range(0)
        for at, length, unit in zip(start, block.shape, units, strict=True)
    ]
    for index in product(*spans):
        # The first and the last cell of the block in this file, along each dimension.
        low = [max(at, each * unit) for at, each, unit in zip(start, index, units, strict=True)]
        high = [
            min(at + length, (each + 1) * unit)
            for at, length, each, unit in zip(start, block.shape, index, units, strict=True)
        ]
        part = block[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, start, strict=True))]
        inside = tuple(a - each * unit for a, each, unit in zip(low, index, units, strict=True))
        yield Piece(grid.number(name, index), count, inside, part.shape, part.tobytes())
        count = 0
