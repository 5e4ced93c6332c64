"""Zarr stores and netCDF files for reading: their variables, and slabs of the variables as they are stored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from manyhands.errors import DataError, ManyhandsError
from manyhands.prepare.gridded.codecs import check_codecs
from manyhands.prepare.gridded.decoding import plain_attributes
from manyhands.storage.files import exists, join_path, names_in

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable as it is stored. attributes: plain values, with names of dimensions removed.

    units: the shape of the parts that are read as a whole (chunks, or shards), or None if any part can be read. fill:
    the value of chunks that were never written, or None if unknown.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, Any]
    units: tuple[int, ...] | None = None
    fill: Any = None
    has_shards: bool = False


class Source(Protocol):
    """An open store or file. Raises DataError if it can't be read.

    absent: the keys of chunks that were requested, but were never written.
    """

    path: str
    variables: Mapping[str, Variable]
    attributes: Mapping[str, Any]
    absent: set[str]

    def read(self, name: str, slab: tuple[slice, ...]) -> NDArray[Any]:
        """Return a part of a variable as it is stored, in native byte order."""
        ...

    def chunk_keys(self, name: str, slab: tuple[slice, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the key of each chunk or shard that overlaps a slab, with the position of its first cell."""
        ...


@contextmanager
def open_source(path: str, form: str) -> Iterator[Source]:
    """Open a zarr store or a netCDF file. One file is open at a time. Raises DataError."""
    source: Any = ZarrSource(path) if form == "zarr" else NetcdfSource(path)
    try:
        yield source
    finally:
        source.close()


def is_zarr_store(folder: str) -> bool:
    """Return True if a folder has the root metadata of a zarr store."""
    return any(exists(join_path(folder, name)) for name in (".zgroup", ".zmetadata", ".zarray", "zarr.json"))


class ZarrSource:
    """A group of a zarr store, of format 2 or 3. Arrays are found by their own metadata, not the consolidated copy."""

    def __init__(self, path: str) -> None:
        import zarr

        from manyhands.prepare.gridded.zarr_store import ReadingStore

        self.path, self._store = path, ReadingStore(path)
        self._arrays: dict[str, Any] = {}
        try:
            with zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1}):
                group = zarr.open_group(self._store, mode="r", use_consolidated=False)
                self.attributes = plain_attributes(group.attrs.asdict())
                self._format = group.metadata.zarr_format
                groups = self._open_arrays()
        except ManyhandsError:
            raise
        except Exception as error:
            raise DataError(
                f"a zarr store can't be opened: {error or type(error).__name__}",
                where=path,
                expected="a group of arrays, in zarr format 2 or 3",
                hint="for an array of a group, read the folder of the group",
            ) from error
        if not self._arrays:
            hint = f"read one of its groups, such as {join_path(path, groups[0])}" if groups else None
            raise DataError("a zarr store has no arrays", where=path, got=f"groups: {groups}"[:200], hint=hint)
        self.variables = {name: _zarr_variable(name, array, self._format) for name, array in self._arrays.items()}

    @property
    def absent(self) -> set[str]:
        """Return the keys of chunks that were requested, but were never written."""
        return self._store.absent

    def _open_arrays(self) -> list[str]:
        """Open all arrays of the group, and return the names of its groups."""
        import json

        import zarr

        groups = []
        for name in names_in(self.path):
            if name[0] in "._" or name == "zarr.json":
                continue
            if self._format == 2:
                file = f"{name}/.zarray"
                metadata = self._store.read(file)
                is_array = metadata is not None
                is_group = not is_array and self._store.read(f"{name}/.zgroup") is not None
            else:
                file = f"{name}/zarr.json"
                metadata = self._store.read(file)
                kind = None if metadata is None else json.loads(metadata).get("node_type")
                is_array, is_group = kind == "array", kind == "group"
            if is_array and metadata is not None:
                check_codecs(metadata, join_path(self.path, file))
                array = zarr.open_array(self._store, path=name, mode="r", zarr_format=self._format)
                if array.shards is None and any("blosc" in type(codec).__name__.lower() for codec in array.compressors):
                    self._store.with_blosc.add(name)
                self._arrays[name] = array
            elif is_group:
                groups.append(name)
        return groups

    def read(self, name: str, slab: tuple[slice, ...]) -> NDArray[Any]:
        """Return a part of a variable. The error of a damaged chunk names the chunk."""
        try:
            return self._read(name, slab)
        except ManyhandsError:
            raise
        except MemoryError as error:
            size = prod(each.stop - each.start for each in slab) * self.variables[name].dtype.itemsize
            raise DataError(
                f"variable {name!r} of a zarr store does not fit in memory",
                where=self.path,
                got=f"{size:,} bytes of the shape {self.variables[name].shape}, "
                f"in chunks of {self.variables[name].units}",
                hint="leave it out with columns=[...], or write it again with smaller chunks",
            ) from error
        except Exception as error:
            key = self._damaged(name, slab)
            raise DataError(
                f"a chunk of a zarr store can't be decoded: {error or type(error).__name__}",
                where=join_path(self.path, key),
                hint="restore the file from a copy of the store",
            ) from error

    def _read(self, name: str, slab: tuple[slice, ...]) -> NDArray[Any]:
        import zarr

        with zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1}):
            found = np.asarray(self._arrays[name][slab if slab else ...])
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def _damaged(self, name: str, slab: tuple[slice, ...]) -> str:
        """Return the key of the first chunk of a slab that can't be read alone, or the variable's name."""
        units = self.variables[name].units or ()
        for key, start in self.chunk_keys(name, slab):
            try:
                self._read(name, tuple(slice(at, at + unit) for at, unit in zip(start, units, strict=True)))
            except Exception:
                return key
        return name

    def chunk_keys(self, name: str, slab: tuple[slice, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        variable, metadata = self.variables[name], self._arrays[name].metadata
        units = variable.units or ()
        spans = [
            range(cells.start // unit, -(-cells.stop // unit)) if cells.stop > cells.start else range(0)
            for cells, unit in zip(slab, units, strict=True)
        ]
        for index in product(*spans):
            start = tuple(each * unit for each, unit in zip(index, units, strict=True))
            yield f"{name}/{metadata.encode_chunk_key(index)}", start

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _zarr_variable(name: str, array: Any, form: int) -> Variable:
    attributes = plain_attributes(array.attrs.asdict())
    dims = attributes.pop("_ARRAY_DIMENSIONS", None) if form == 2 else array.metadata.dimension_names
    named = [f"dim_{axis}" for axis in range(array.ndim)] if dims is None else list(dims)
    found = tuple(f"dim_{axis}" if dim is None else str(dim) for axis, dim in enumerate(named))
    if len(found) != array.ndim or len(set(found)) < len(found):
        raise DataError(f"array {name!r} of a zarr store has wrong names of dimensions", got=str(dims))
    return Variable(
        name=name,
        dims=found,
        shape=tuple(array.shape),
        dtype=np.dtype(array.dtype),
        attributes=attributes,
        units=tuple(array.shards or array.chunks),
        fill=array.metadata.fill_value if form == 2 else None,
        has_shards=array.shards is not None,
    )


class NetcdfSource:
    """A netCDF file of format 3 or 4, or CDF-5. Values are read as they are stored, without decoding by the library."""

    def __init__(self, path: str) -> None:
        import netCDF4

        self.path, self.absent = path, set[str]()
        try:
            self._file = netCDF4.Dataset(path, "r")
        except (OSError, RuntimeError) as error:
            raise DataError(f"a netCDF file can't be opened: {error}", where=path) from error
        self._file.set_auto_maskandscale(False)
        self._file.set_auto_chartostring(False)
        self.attributes = plain_attributes({name: self._file.getncattr(name) for name in self._file.ncattrs()})
        self.variables = {name: _netcdf_variable(name, each) for name, each in self._file.variables.items()}
        if not self.variables:
            got = f"groups: {', '.join(self._file.groups)}"[:200]
            self.close()
            raise DataError(
                "a netCDF file has no variables outside of groups",
                where=path,
                got=got,
                hint="write the group to a file of its own, for example with ncks -G : -g GROUP",
            )

    def read(self, name: str, slab: tuple[slice, ...]) -> NDArray[Any]:
        """Return a part of a variable. Characters along a last dimension are joined to text."""
        variable = self._file.variables[name]
        cells = (*slab, slice(None)) if _is_characters(variable) else slab
        try:
            found = np.asarray(variable[cells if cells else ...])
        except (OSError, RuntimeError, IndexError) as error:
            raise DataError(
                f"variable {name!r} of a netCDF file can't be read: {error}",
                where=self.path,
                hint="copy the file again; it may be truncated or damaged",
            ) from error
        if _is_characters(variable):
            found = np.ascontiguousarray(found)
            found = (
                found.view(f"S{found.shape[-1] or 1}")[..., 0] if found.shape[-1] else np.zeros(found.shape[:-1], "S1")
            )
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def chunk_keys(self, name: str, slab: tuple[slice, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        return iter(())

    def close(self) -> None:
        """Close the file."""
        if self._file.isopen():
            self._file.close()


def _is_characters(variable: Any) -> bool:
    return bool(variable.dtype == np.dtype("S1") and variable.dimensions)


def _netcdf_variable(name: str, variable: Any) -> Variable:
    chunks = variable.chunking()
    dtype = np.dtype(object) if variable.dtype is str else np.dtype(variable.dtype)
    found = Variable(
        name=name,
        dims=tuple(variable.dimensions),
        shape=tuple(variable.shape),
        dtype=dtype,
        attributes=plain_attributes({each: variable.getncattr(each) for each in variable.ncattrs()}),
        units=tuple(chunks) if isinstance(chunks, (list, tuple)) else None,
    )
    if not _is_characters(variable):
        return found
    units = None if found.units is None else found.units[:-1]
    return replace(found, dims=found.dims[:-1], shape=found.shape[:-1], units=units, dtype=np.dtype(object))


def file_of(path: str, form: str) -> str:
    """Return the file whose size and time identify a source: the netCDF file, or the root metadata of a store."""
    if form != "zarr":
        return path
    names = ("zarr.json", ".zgroup", ".zmetadata")
    found = next((name for name in names if os.path.exists(join_path(path, name))), None)
    return join_path(path, found or names[0])
