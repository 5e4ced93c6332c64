"""Checks the arguments of a Dataset's methods.

Each check raises ConfigError where Python would fail later or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from manyhands.errors import ConfigError
from manyhands.options import whole_number
from manyhands.prepare.gridded.layout import ZarrLayout
from manyhands.prepare.records.functions import check_job_function
from manyhands.prepare.records.keys import Key, key_from


def checked_key(key: Any, method: str) -> Key:
    """Return the internal form of a key: a function, the name of a column, a list or tuple of names, or None."""
    if callable(key):
        check_job_function(key, f"the key of {method}")
        return key_from(key)
    names = [key] if isinstance(key, str) else key
    if key is not None and not (
        isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)
    ):
        raise ConfigError(
            f"the key of {method} can't be used",
            expected="a function of the record, the name of a column, a list of such names, or None for the record",
            got=repr(key)[:200],
        )
    return key_from(key)


def checked_partition_bytes(value: Any) -> int:
    """Return the value as an int. Raises ConfigError unless it is an integer of at least 1."""
    checked = whole_number(value)
    if checked is None or checked < 1:
        raise ConfigError("partition_bytes is not an integer of at least 1", got=repr(value)[:200])
    return checked


def check_fraction(value: Any) -> None:
    """Raise ConfigError unless the value is a number from 0 to 1."""
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError("fraction is not between 0 and 1", got=repr(value)[:200])


def checked_seed(value: Any) -> int:
    """Return the value as an int. Raises ConfigError unless it is an integer."""
    checked = whole_number(value)
    if checked is None:
        raise ConfigError("seed is not an integer", got=repr(value)[:200])
    return checked


def check_schema(schema: Any) -> None:
    """Raise ConfigError unless the value is an Arrow schema or None."""
    if schema is not None and not isinstance(schema, pa.Schema):
        hint = 'import pyarrow as pa; write(..., schema=pa.schema([("name", pa.string())]))'
        raise ConfigError(
            "schema is not an Arrow schema", expected="a pyarrow.Schema", got=repr(schema)[:200], hint=hint
        )


def check_types(types: Any) -> None:
    """Raise ConfigError unless the value is a dict of texts or None."""
    if types is not None and not (
        isinstance(types, Mapping) and all(isinstance(text, str) for item in types.items() for text in item)
    ):
        expected = 'a dict from names of columns to types, such as {"age": "int64"}'
        raise ConfigError("types can't be used", expected=expected, got=repr(types)[:200])


def check_layout(form: str, layout: Any, schema: Any) -> None:
    """Raise ConfigError unless there is a layout for the format zarr, and none for any other format."""
    if form != "zarr" and layout is not None:
        raise ConfigError("only the format 'zarr' has a layout", got=repr(form), hint="use write(..., format='zarr')")
    if form == "zarr" and (schema is not None or not isinstance(layout, ZarrLayout)):
        raise ConfigError(
            "the format 'zarr' needs a layout, and no schema",
            expected="layout=mh.ZarrLayout(...)",
            got=repr(layout if schema is None else schema)[:200],
            hint="the layout has the variables with their dimensions: dims={'z': ('time', 'lat', 'lon')}",
        )
