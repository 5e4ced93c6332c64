"""The layout of an output that has the variables, coordinates and attributes of zarr stores or netCDF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from manyhands.prepare.gridded.coordinates import encode_coordinate, objects_of
from manyhands.prepare.gridded.decoding import descriptive
from manyhands.prepare.gridded.description import Described, common_types, coordinate_numbers, describe
from manyhands.prepare.gridded.layout import Coordinate, ZarrLayout
from manyhands.prepare.gridded.sources import Source, open_source
from manyhands.prepare.io.listing import Split


def layout_of(splits: Sequence[Split], columns: Sequence[str], changes: Mapping[str, Any]) -> ZarrLayout:
    """Return the layout of the sources of these splits. changes: arguments of `ZarrLayout` that replace its arguments.

    columns: the dimension of records, and the names of the variables.
    """
    record, *names = columns
    forms = {split.path: split.format for split in splits}
    fill_value, integers = next((split.arrays.fill_value, split.arrays.integers) for split in splits if split.arrays)
    described: list[Described] = []
    steps: list[Any] = []
    coords: dict[str, Any] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for path, form in forms.items():
        with open_source(path.rpartition("/")[0] if form == "zarr" else path, form) as source:
            described.append(describe(source, names, record, fill_value=fill_value, integers=integers))
            if record in source.variables:
                steps.append(_objects(source, record))
            if len(described) == 1:
                coords, attributes = _coordinates(source, described[0]), _attributes(source, described[0])
    if steps:
        kept = {name: value for name, value in attributes.pop(record, {}).items() if name not in ("units", "calendar")}
        units = described[0].variables[record].attributes.get("units")
        if described[0].calendar is None and units is not None:
            kept["units"] = units
        values = np.concatenate(steps)
        coords[record] = Coordinate((record,), *encode_coordinate(record, values, kept))
    first = described[0]
    types = {name: kind.str for name, kind in first.types.items()} | dict(common_types(described, integers))
    arguments: dict[str, Any] = {
        "dims": {name: first.variables[name].dims for name in names},
        "sizes": _sizes(described, record),
        "record": record,
        "dtypes": types,
        **changes,
        "coords": {**coords, **changes.get("coords", {})},
        "attrs": {**attributes, **changes.get("attrs", {})},
    }
    _drop_unused(arguments, changes)
    return ZarrLayout(**arguments)


def _objects(source: Source, name: str) -> Any:
    return objects_of(coordinate_numbers(source, name), source.variables[name].attributes)


def _coordinates(source: Source, described: Described) -> dict[str, Any]:
    """Return the coordinates of a source along other dimensions than that of records."""
    known = {dim for name in described.columns for dim in described.variables[name].dims} - {described.record}
    listed = set(str(source.attributes.get("coordinates", "")).split())
    for variable in source.variables.values():
        listed.update(str(variable.attributes.get("coordinates", "")).split())
    found = {}
    for name, variable in source.variables.items():
        if name in described.columns or not set(variable.dims) <= known or not (name in known or name in listed):
            continue
        kept = descriptive(variable.attributes)
        for own in ("units", "calendar") if " since " in str(kept.get("units", "")) else ():
            kept.pop(own, None)
        found[name] = Coordinate(variable.dims, *encode_coordinate(name, _objects(source, name), kept))
    return found


def _attributes(source: Source, described: Described) -> dict[str, dict[str, Any]]:
    """Return the attributes of the store, of the variables and of the record dimension."""
    own = {name: value for name, value in source.attributes.items() if name != "coordinates"}
    names = [name for name in (*described.columns, described.record) if name in described.variables]
    return {"": own, **{name: descriptive(described.variables[name].attributes) for name in names}}


def _sizes(described: Sequence[Described], record: str) -> dict[str, int]:
    first = described[0]
    sizes = {
        dim: size
        for name in first.columns
        for dim, size in zip(first.variables[name].dims, first.variables[name].shape, strict=True)
    }
    return {**sizes, record: sum(each.size for each in described)}


def _drop_unused(arguments: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Leave out what belongs to variables and dimensions that the changes have removed or replaced."""
    given = changes.get("coords", {})
    if "sizes" not in changes:
        arguments["sizes"] = {name: size for name, size in arguments["sizes"].items() if name not in given}
    dims = {dim for along in dict(arguments["dims"]).values() for dim in along}
    coords = arguments["coords"]
    for name in [name for name in coords if name not in given]:
        if not set(coords[name].dims) <= dims:
            del coords[name]
    if "dims" in changes:
        arguments["sizes"] = {name: size for name, size in arguments["sizes"].items() if name in dims}
        if "dtypes" not in changes:
            arguments["dtypes"] = {name: kind for name, kind in arguments["dtypes"].items() if name in changes["dims"]}
    known = {"", *arguments["dims"], *coords}
    arguments["attrs"] = {
        name: each for name, each in arguments["attrs"].items() if name in known or name in changes.get("attrs", {})
    }
