"""ZarrLayout: the variables, dimensions, coordinates and chunks of a zarr store, fixed before the first task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from manyhands.errors import ConfigError
from manyhands.prepare.gridded.coordinates import decode_coordinate, encode_coordinate, key_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

CODECS = ("zstd", "zlib", "none")

_NAMES = "text without / that doesn't begin with _ or ."


class Coordinate(NamedTuple):
    """The values along one or more dimensions, as the store holds them (see `encode_coordinate`)."""

    dims: tuple[str, ...]
    values: NDArray[Any]
    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ZarrLayout:
    """The layout of a zarr store that `Dataset.write(format="zarr", layout=...)` writes.

    A record has a value for each dimension in `record`, and for each variable an array over the variable's other
    dimensions, in their order. An array that has all dimensions of its variable is a block of several steps: the
    record's values are those of its first step.

    dims: the dimensions of each variable, in order.
    coords: the values along each dimension: numbers, times (`datetime64`, datetime), time differences or text. Any
        other name is an additional coordinate; its value is a pair of dimensions and array, such as
        `(("y", "x"), array)`.
    sizes: the sizes of dimensions that have no coordinate. Records then hold positions, counted from 0.
    record: the dimensions along which records are placed. The default is the first dimension of the first variable.
    dtypes: the type of each variable, or of all; the default is float32. Floats may be rounded to shorter floats. No
        other value is changed.
    attrs: the attributes of variables and coordinates by name, such as {"z": {"units": "m"}}; those of the store are
        under the name "".
    chunks: the sizes of chunks by dimension. The default is 1 for the dimensions of `record`, and otherwise the full
        size.
    shards: the sizes of shards, which are files of several chunks (format 3 only), by dimension: multiples of the sizes
        of chunks.
    packing: for variables that are stored as integers, a dict with `scale_factor`, and optionally `add_offset` and
        `_FillValue` (the integer for NaN). A value that the packed type can't hold is an error.
    gaps: "error" if each cell of each variable must be in a record; "fill" if the others are missing values.
    codec: zstd, zlib (format 2 only) or none. gzip is refused, because its header contains the time of writing.
    format: the zarr format, 2 or 3.

    Raises ConfigError if an argument is invalid.
    """

    dims: Mapping[str, Sequence[str]]
    coords: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    record: str | Sequence[str] = ()
    dtypes: str | Mapping[str, str] = "float32"
    attrs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chunks: Mapping[str, int] = field(default_factory=dict)
    shards: Mapping[str, int] = field(default_factory=dict)
    packing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gaps: str = "error"
    codec: str = "zstd"
    format: int = 2

    def __post_init__(self) -> None:
        """Check the arguments, and replace them by plain values."""
        for name in ("coords", "sizes", "attrs", "chunks", "shards", "packing"):
            if not isinstance(getattr(self, name), Mapping):
                raise _wrong(name, "a dict", getattr(self, name))
        dims = _checked_dims(self.dims)
        if not isinstance(self.dtypes, str):
            _check_known("dtypes", self.dtypes, set(dims))
        first = next(iter(dims.values()))
        record = _names("record", self.record) if self.record else first[:1]
        coords = {name: self._coordinate(name, values, dims) for name, values in self.coords.items()}
        self._set(dims=dims, record=record, coords=coords)
        self._set(sizes=self._all_sizes(), dtypes={name: self._dtype(name) for name in dims})
        self._check_names()
        self._check_choices()
        self._set(chunks=self._chunk_sizes(), shards=self._shard_sizes())
        self._set(packing={name: self._checked_packing(name, each) for name, each in self.packing.items()})
        for dim in record:
            _positions(dim, self)

    def __repr__(self) -> str:
        """Return the variables with their dimensions, and the sizes."""
        return f"ZarrLayout({self.dims}, {self.sizes}, record={self.record})"

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _coordinate(self, name: str, values: Any, dims: Mapping[str, tuple[str, ...]]) -> Coordinate:
        if isinstance(values, Coordinate):
            return Coordinate(values.dims, values.values, {**values.attributes, **self.attrs.get(name, {})})
        along: tuple[str, ...] = (name,)
        if not any(name in each for each in dims.values()):
            if not (isinstance(values, tuple) and len(values) == 2):
                expected = 'a dimension of a variable, or a pair of dimensions and values such as (("y", "x"), array)'
                raise _wrong(f"coords[{name!r}]", expected, values)
            along, values = _names(f"coords[{name!r}]", values[0], empty=True), values[1]
        array, attributes = encode_coordinate(name, values, self.attrs.get(name, {}))
        if array.ndim != len(along):
            raise _wrong(f"coords[{name!r}]", f"an array over {', '.join(along)}", f"{array.ndim} dimensions")
        return Coordinate(along, array, attributes)

    def _all_sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, size in self.sizes.items():
            sizes[name] = _whole(f"sizes[{name!r}]", size, 0)
        for name, coordinate in self.coords.items():
            for dim, size in zip(coordinate.dims, coordinate.values.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise _wrong(f"coords[{name!r}]", f"{sizes[dim]} values along {dim!r}", size)
        for name, along in self.dims.items():
            missing = next((dim for dim in along if dim not in sizes), None)
            if missing is not None:
                raise ConfigError(
                    f"dimension {missing!r} of variable {name!r} has no size",
                    hint=f"give its values with coords={{{missing!r}: ...}}, or its size with sizes={{{missing!r}: n}}",
                )
        return sizes

    def _dtype(self, name: str) -> str:
        given = self.dtypes if isinstance(self.dtypes, str) else dict(self.dtypes).get(name, "float32")
        try:
            kind = np.dtype(given)
        except TypeError:
            kind = np.dtype(object)
        if kind.kind not in "biuf":
            raise _wrong(f"the type of {name!r}", "float32, int16, bool or another type of numbers", given)
        return kind.str

    def _check_names(self) -> None:
        for name in (*self.dims, *self.sizes, *self.coords):
            if not isinstance(name, str) or not name or name[0] in "_." or "/" in name:
                raise _wrong("a name", _NAMES, name)
        both = set(self.dims) & set(self.coords)
        if both:
            raise _wrong("coords", "names that are not those of variables", sorted(both)[0])
        for name, along in self.dims.items():
            lacking = set(self.record).difference(along)
            if lacking:
                raise _wrong(f"dims[{name!r}]", f"all dimensions of records: {', '.join(self.record)}", along)
        known = {*self.sizes}
        for argument in ("chunks", "shards"):
            _check_known(argument, getattr(self, argument), known)
        _check_known("attrs", self.attrs, {"", *self.dims, *self.coords})
        _check_known("packing", self.packing, set(self.dims))
        try:
            json.dumps({name: dict(each) for name, each in self.attrs.items()})
        except (TypeError, ValueError) as error:
            raise _wrong("attrs", "text, numbers, lists and dicts, as JSON has them", error) from error

    def _check_choices(self) -> None:
        if self.format not in (2, 3):
            raise _wrong("format", "2 or 3", self.format)
        codecs = CODECS if self.format == 2 else ("zstd", "none")
        if self.codec not in codecs:
            hint = "gzip's header contains the time of writing" if self.codec == "gzip" else None
            raise _wrong("codec", f"{', '.join(codecs)} in zarr format {self.format}", self.codec, hint)
        if self.gaps not in ("error", "fill"):
            raise _wrong("gaps", "error or fill", self.gaps)
        if self.shards and self.format == 2:
            raise _wrong("shards", "none in zarr format 2", dict(self.shards), "use format=3")
        for name, kind in self.dtypes.items():  # type: ignore[union-attr]
            has_missing = np.dtype(kind).kind == "f" or name in self.packing or "_FillValue" in self.attrs.get(name, {})
            if self.gaps == "fill" and not has_missing:
                hint = f"use attrs={{{name!r}: {{'_FillValue': ...}}}}, or a type of floats"
                raise _wrong(f"the type of {name!r}", "a type with missing values, because of gaps='fill'", kind, hint)

    def _chunk_sizes(self) -> dict[str, int]:
        """Return the size of chunks along each dimension. A chunk is no larger than the dimension without shards."""
        sizes = {}
        for dim, size in self.sizes.items():
            chunk = _whole(f"chunks[{dim!r}]", self.chunks.get(dim, 1 if dim in self.record else max(1, size)), 1)
            sizes[dim] = chunk if dim in self.shards else min(chunk, max(1, size))
        return sizes

    def _shard_sizes(self) -> dict[str, int]:
        """Return the size of shards along each dimension, or an empty dict if there are no shards."""
        if not self.shards:
            return {}
        sizes = {}
        for dim, chunk in self.chunks.items():
            whole = -(-max(1, self.sizes[dim]) // chunk) * chunk
            default = chunk if dim in self.record else whole
            sizes[dim] = _whole(f"shards[{dim!r}]", self.shards.get(dim, default), 1)
            if sizes[dim] % chunk:
                raise _wrong(f"shards[{dim!r}]", f"a multiple of the chunk's {chunk}", sizes[dim])
        return sizes

    def _checked_packing(self, name: str, packing: Any) -> dict[str, float]:
        known = ("scale_factor", "add_offset", "_FillValue")
        kind = np.dtype(self.dtypes[name])  # type: ignore[index]
        if not isinstance(packing, Mapping) or not set(packing) <= set(known) or kind.kind not in "iu":
            got = f"{packing!r} for {kind}"
            raise _wrong(f"packing[{name!r}]", f"a dict with {', '.join(known)}, and a type of integers", got)
        limits = np.iinfo(kind)
        found: dict[str, float] = {"scale_factor": 1.0, "add_offset": 0.0}
        found |= {"_FillValue": limits.min if kind.kind == "i" else limits.max, **packing}
        if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in found.values()):
            raise _wrong(f"packing[{name!r}]", "finite numbers", packing)
        if not found["scale_factor"] or not limits.min <= found["_FillValue"] <= limits.max:
            raise _wrong(f"packing[{name!r}]", f"a scale_factor that isn't 0, and a _FillValue of type {kind}", packing)
        return {**found, "_FillValue": int(found["_FillValue"])}

    def unit(self, name: str) -> tuple[int, ...]:
        """Return the shape of the part of a variable that one file holds: a chunk, or a shard."""
        return tuple((self.shards or self.chunks)[dim] for dim in self.dims[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a variable."""
        return tuple(self.sizes[dim] for dim in self.dims[name])

    def fill_of(self, name: str) -> Any:
        """Return the value of missing cells of a variable, as it is stored, or None if it has no such value."""
        if name in self.packing:
            return self.packing[name]["_FillValue"]
        given = self.attrs.get(name, {}).get("_FillValue")
        return given if given is not None else (np.nan if np.dtype(self.dtypes[name]).kind == "f" else None)  # type: ignore[index]


class Owner(NamedTuple):
    """A file of a store: its variable, and its place in the variable's grid of files."""

    name: str
    place: tuple[int, ...]


class Grid:
    """Numbers the files of all variables of a layout, and finds the positions of records."""

    def __init__(self, layout: ZarrLayout) -> None:
        self.layout = layout
        self.firsts: dict[str, int] = {}  # the number of each variable's first file
        self.counts: dict[str, tuple[int, ...]] = {}
        self.total = 0
        for name in layout.dims:
            pairs = zip(layout.shape(name), layout.unit(name), strict=True)
            self.counts[name] = tuple(-(-size // unit) for size, unit in pairs)
            self.firsts[name] = self.total
            self.total += math.prod(self.counts[name])
        self._filled = {name: first for name, first in self.firsts.items() if 0 not in self.counts[name]}
        self.positions = {dim: _positions(dim, layout) for dim in layout.record}
        # The decoded coordinates along the dimensions of records.
        self.values = {
            dim: decode_coordinate(layout.coords[dim].values, layout.coords[dim].attributes)
            for dim in layout.record
            if dim in layout.coords
        }

    def owner(self, number: int) -> Owner:
        """Return the variable of a file, and its index in the variable's grid of files."""
        name = next(name for name in reversed(self._filled) if self._filled[name] <= number)
        index = np.unravel_index(number - self.firsts[name], self.counts[name]) if self.counts[name] else ()
        return Owner(name, tuple(int(each) for each in index))

    def number(self, name: str, index: Sequence[int]) -> int:
        """Return the number of a file."""
        number = 0
        for each, count in zip(index, self.counts[name], strict=True):
            number = number * count + each
        return self.firsts[name] + number

    def extent(self, owner: Owner) -> tuple[int, ...]:
        """Return the shape of the cells of a file. Files at the end of a dimension may have fewer cells."""
        cells = zip(owner.place, self.layout.unit(owner.name), self.layout.shape(owner.name), strict=True)
        return tuple(min(unit, size - each * unit) for each, unit, size in cells)

    def place(self, name: str, position: Sequence[int]) -> str:
        """Describe a cell of a variable by its coordinates along the dimensions of records, for messages."""
        found = []
        for dim, at in zip(self.layout.dims[name], position, strict=True):
            if dim in self.layout.record:
                found.append(f"{dim}={self.values[dim][at] if dim in self.values else at}")
        return f"{name} at {', '.join(found)}"


@lru_cache(maxsize=4)
def grid_of(layout: ZarrLayout) -> Grid:
    """Return the grid of a layout."""
    return Grid(layout)


def _positions(dim: str, layout: ZarrLayout) -> Mapping[Any, int]:
    """Return the position of each value along a dimension of records. Raises ConfigError if values are equal."""
    coordinate = layout.coords.get(dim)
    if coordinate is None:
        return {index: index for index in range(layout.sizes[dim])}
    values = decode_coordinate(coordinate.values, coordinate.attributes)
    found = {key_of(value): index for index, value in enumerate(values)}
    if len(found) < len(values):
        keys = [key_of(value) for value in values]
        twice = next(value for value, key in zip(values, keys, strict=True) if keys.count(key) > 1)
        raise ConfigError(
            f"dimension {dim!r} of the records has equal values, so the places of records are unknown", got=str(twice)
        )
    return found


def _checked_dims(dims: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(dims, Mapping) or not dims:
        raise _wrong("dims", 'a dict such as {"z": ("time", "lat", "lon")}', dims)
    return {name: _names(f"dims[{name!r}]", along) for name, along in dims.items()}


def _names(argument: str, names: Any, *, empty: bool = False) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (None,)
    is_names = all(isinstance(name, str) for name in found) and len(set(found)) == len(found)
    if not is_names or not (found or empty):
        raise _wrong(argument, "different names of dimensions", names)
    return found


def _whole(argument: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise _wrong(argument, f"an integer of at least {least}", value)
    return int(value)


def _check_known(argument: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise _wrong(argument, f"only {', '.join(sorted(filter(None, known)))}", unknown)


def _wrong(argument: str, expected: str, got: Any, hint: str | None = None) -> ConfigError:
    shown = got if isinstance(got, str) else repr(got)
    return ConfigError(f"{argument} of the layout can't be used", expected=expected, got=shown[:200], hint=hint)
