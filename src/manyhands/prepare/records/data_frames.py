"""Converts tables of Arrow, pandas and Polars to records. Does not import pandas or Polars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from manyhands.errors import ConfigError
from manyhands.prepare.records.chunks import records_of

_PACKAGES = ("pyarrow", "pandas", "polars")


def is_foreign_table(value: Any) -> bool:
    """Return True if `value` is an object of Arrow, pandas or Polars."""
    return type(value).__module__.partition(".")[0] in _PACKAGES


def given_records(records: Iterable[Any]) -> list[Any]:
    """Return the records that a caller passed, as a list: the items of an iterable, or the rows of a table.

    Raises ConfigError for an object whose items are not its records: text, bytes, a dict.
    """
    if isinstance(records, (str, bytes, bytearray, Mapping)) or not (
        isinstance(records, Iterable) or is_foreign_table(records)
    ):
        raise ConfigError(
            "from_records takes a list of records",
            expected="a list or another iterable, or a table of Arrow, pandas or Polars",
            got=type(records).__name__,
            hint="put a single record into a list; read files with Dataset.read",
        )
    if not is_foreign_table(records):
        return list(records)
    import pyarrow as pa

    if isinstance(records, (pa.Array, pa.ChunkedArray)):
        from manyhands.prepare.records.columns import values_of_column

        return values_of_column(records, "value")
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(records, pandas.DataFrame):
        return _rows_of_pandas(records, pandas)
    table = _as_table(records)
    if table is None:
        return list(records)  # a Series, whose items are the records
    _check_names(table.column_names)
    return records_of(table)


def _check_names(names: list[str]) -> None:
    twice = [name for index, name in enumerate(names) if name in names[:index]] if len(set(names)) < len(names) else []
    if twice:
        raise ConfigError(f"a table has two columns named {twice[0]!r}", hint="rename one of them")


def _as_table(value: Any) -> Any:
    """Return the Arrow table of an object, or None if it is a column. Raises ConfigError if it can't be a table."""
    import pyarrow as pa

    if isinstance(value, pa.Table):
        return value
    if isinstance(value, pa.RecordBatch):
        return pa.Table.from_batches([value])
    if isinstance(value, pa.RecordBatchReader):
        return value.read_all()
    polars = sys.modules.get("polars")
    if polars is not None and isinstance(value, polars.DataFrame):
        return value.to_arrow()
    if type(value).__name__ in ("Series", "Index"):
        return None
    raise ConfigError(
        "from_records takes a list of records",
        expected="a list or another iterable, or a table of Arrow, pandas or Polars",
        got=f"{type(value).__module__}.{type(value).__qualname__}",
        hint="compute a table first: LazyFrame.collect(), or dataset.to_table()",
    )


def _rows_of_pandas(frame: Any, pandas: Any) -> list[Any]:
    """Return the rows of a DataFrame. An index with a name becomes a column. NaN in a column of floats stays NaN."""
    import pyarrow as pa

    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = [str(name) for name in frame.columns]
    _check_names(names)
    columns = []
    for position in range(len(names)):
        series = frame.iloc[:, position]
        is_numpy = not pandas.api.types.is_extension_array_dtype(series.dtype)
        # Arrow would convert NaN to null, and refuse objects of several types.
        if is_numpy and series.dtype.kind in "fO":
            columns.append(series.tolist())
        else:
            values = records_of(pa.table({"value": pa.array(series, from_pandas=True)}))
            columns.append([row["value"] for row in values])
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
