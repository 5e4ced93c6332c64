"""The files of a zarr store with a given layout: metadata and coordinates, and the file of each chunk or shard.

zarr writes all of them into memory, so this process decides when and where they appear. Their bytes depend only on the
values, and on the versions of zarr and numcodecs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.errors import DataError
from manyhands.prepare.gridded.layout import Owner, ZarrLayout, grid_of
from manyhands.prepare.gridded.pieces import Piece

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT_FILES = (".zgroup", ".zattrs", ".zmetadata", "zarr.json")
"""The files that make a folder a zarr store. Without them, the store can't be opened."""

_LEVEL = 1  # of the codec


class StoreFiles:
    """A store in memory. Its metadata and coordinates are complete, and chunks of variables are encoded one by one."""

    def __init__(self, layout: ZarrLayout) -> None:
        import zarr
        from zarr.storage import MemoryStore

        self.layout, self._grid = layout, grid_of(layout)
        self._files: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # text coordinates, and consolidated metadata, are extensions of format 3
            extra = [name for name, each in layout.coords.items() if (name,) != each.dims]
            attributes = {**({"coordinates": " ".join(extra)} if extra else {}), **layout.attrs.get("", {})}
            store = MemoryStore(self._files)
            group = zarr.create_group(store, zarr_format=layout.format, attributes=attributes)
            self._arrays = {name: _create(group, layout, name) for name in layout.dims}
            for name, coordinate in layout.coords.items():
                array = _create_coordinate(group, layout, name)
                if coordinate.values.size:
                    array[...] = coordinate.values
            zarr.consolidate_metadata(store)

    def metadata(self) -> dict[str, bytes]:
        """Return the metadata and the coordinates: the content of each file by its name in the store."""
        return {name: self._files[name].to_bytes() for name in sorted(self._files)}

    def encode(self, owner: Owner, values: NDArray[Any]) -> tuple[str, bytes]:
        """Return the name and the content of the file of a chunk or shard. values: its cells, without padding."""
        units = self.layout.unit(owner.name)
        starts = [index * unit for index, unit in zip(owner.place, units, strict=True)]
        known = set(self._files)
        cells = tuple(slice(at, at + size) for at, size in zip(starts, values.shape, strict=True))
        self._arrays[owner.name][cells if cells else ...] = values
        (name,) = set(self._files) - known
        return name, self._files.pop(name).to_bytes()


@lru_cache(maxsize=2)
def files_of(layout: ZarrLayout) -> StoreFiles:
    """Return the store in memory of a layout."""
    return StoreFiles(layout)


def _codec(layout: ZarrLayout) -> Any:
    if layout.codec == "none":
        return None
    if layout.format == 3:
        from zarr.codecs import ZstdCodec

        return ZstdCodec(level=_LEVEL)
    import numcodecs

    return numcodecs.Zstd(level=_LEVEL) if layout.codec == "zstd" else numcodecs.Zlib(level=_LEVEL)


def _create(group: Any, layout: ZarrLayout, name: str) -> Any:
    kind = np.dtype(layout.dtypes[name])  # type: ignore[index]
    fill = layout.fill_of(name)
    attributes = {key: value for key, value in layout.attrs.get(name, {}).items() if key != "_FillValue"}
    if name in layout.packing:
        attributes |= {key: layout.packing[name][key] for key in ("scale_factor", "add_offset")}
    if fill is not None and not (kind.kind == "f" and np.isnan(fill)):
        attributes["_FillValue"] = _fill_attribute(layout, kind, fill)
    chunks = tuple(layout.chunks[dim] for dim in layout.dims[name])
    shards = tuple(layout.shards[dim] for dim in layout.dims[name]) if layout.shards else None
    # In format 2, readers take a fill value of 0 for "missing". All chunks are written, so none is needed.
    default = None if layout.format == 2 else kind.type(0).item()
    return _create_array(
        group, layout, name, layout.dims[name], attributes,
        shape=layout.shape(name), chunks=chunks, shards=shards, dtype=kind,
        fill_value=default if fill is None else kind.type(fill).item(),
    )  # fmt: skip


def _fill_attribute(layout: ZarrLayout, kind: np.dtype[Any], fill: Any) -> Any:
    """Return the attribute `_FillValue` in the form of xarray, which is base64 text for floats in format 3."""
    value = kind.type(fill)
    if layout.format == 2 or kind.kind != "f":
        return value.item()
    from xarray.backends.zarr import FillValueCoder

    return FillValueCoder.encode(value, kind)


def _create_coordinate(group: Any, layout: ZarrLayout, name: str) -> Any:
    coordinate = layout.coords[name]
    values = coordinate.values
    fill = None if layout.format == 2 or values.dtype.kind == "U" else values.dtype.type(0)
    if values.dtype.kind == "U" and layout.format == 3:
        fill = ""
    shape = tuple(max(1, size) for size in values.shape)
    attributes = {**coordinate.attributes, **layout.attrs.get(name, {})}
    return _create_array(
        group, layout, name, coordinate.dims, attributes,
        shape=values.shape, chunks=shape, shards=None, dtype=values.dtype, fill_value=fill,
    )  # fmt: skip


def _create_array(group: Any, layout: ZarrLayout, name: str, dims: Any, attributes: Any, **options: Any) -> Any:
    if layout.format == 2:
        attributes = {"_ARRAY_DIMENSIONS": list(dims), **attributes}
    else:
        options["dimension_names"] = list(dims)
    codec = _codec(layout)
    return group.create_array(
        name, attributes=attributes, filters=None, compressors=None if codec is None else [codec],
        config={"write_empty_chunks": True}, **options,
    )  # fmt: skip


class FileAssembler:
    """Assembles the files of a range of owners from pieces in the order of owners, and passes them to `write`.

    write: called with the name and the content of each file, in the order of owners. Each file of the range is written,
    even if no piece belongs to it. records: the number of records whose first piece was added.
    """

    def __init__(self, layout: ZarrLayout, owners: range, write: Callable[[str, bytes], None]) -> None:
        self._layout, self._grid, self._write = layout, grid_of(layout), write
        self._files = files_of(layout)
        self._next, self._stop = owners.start, owners.stop  # the number of the current file, and the end of the range
        self._values: NDArray[Any] | None = None
        self._filled: NDArray[Any] | None = None
        self.records = 0

    def add(self, pieces: list[Piece]) -> None:
        """Add pieces. Raises DataError if a cell is in two pieces, or in none although the layout does not allow it."""
        for piece in pieces:
            while self._next < piece.owner:
                self._finish()
            self._place(Piece(*piece))

    def close(self) -> None:
        """Write the remaining files of the range."""
        while self._next < self._stop:
            self._finish()

    def _place(self, piece: Piece) -> None:
        owner = self._grid.owner(piece.owner)
        if self._values is None or self._filled is None:
            self._values, self._filled = self._empty(owner)
        cells = tuple(slice(at, at + size) for at, size in zip(piece.start, piece.shape, strict=True))
        if self._filled[cells].any():
            raise DataError(
                "two records have a value of the same cell of the store",
                where=self._first(owner, self._filled[cells], piece.start),
                hint="make the dimensions of `record` identify a record, or drop one of the two with distinct()",
            )
        self._values[cells] = np.frombuffer(piece.data, self._values.dtype).reshape(piece.shape)
        self._filled[cells] = True
        self.records += piece.records

    def _empty(self, owner: Owner) -> tuple[NDArray[Any], NDArray[Any]]:
        extent = self._grid.extent(owner)
        fill = self._layout.fill_of(owner.name)
        kind = np.dtype(self._layout.dtypes[owner.name])  # type: ignore[index]
        return np.full(extent, 0 if fill is None else fill, kind), np.zeros(extent, bool)

    def _finish(self) -> None:
        owner = self._grid.owner(self._next)
        if self._values is None or self._filled is None:
            self._values, self._filled = self._empty(owner)
        if self._layout.gaps == "error" and not self._filled.all():
            raise DataError(
                "no record has a value of a cell of the store",
                where=self._first(owner, ~self._filled, (0,) * self._filled.ndim),
                hint="write all records of the layout, or use gaps='fill', which stores missing values there",
            )
        self._write(*self._files.encode(owner, self._values))
        self._values = self._filled = None
        self._next += 1

    def _first(self, owner: Owner, mask: NDArray[Any], start: tuple[int, ...]) -> str:
        """Describe the first cell of a file for which a mask, which begins at `start`, is true."""
        inside = np.unravel_index(int(np.argmax(mask)), mask.shape) if mask.ndim else ()
        units = self._layout.unit(owner.name)
        position = [
            index * unit + at + int(each)
            for index, unit, at, each in zip(owner.place, units, start, inside, strict=True)
        ]
        return self._grid.place(owner.name, position)


def all_owners(layout: ZarrLayout) -> range:
    """Return the numbers of all files of variables."""
    return range(grid_of(layout).total)
