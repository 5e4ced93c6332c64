"""Reads array files (`manyhands.data.array_format`) as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from manyhands.data.array_format import Layout, read_layout, read_rows
from manyhands.errors import DataError
from manyhands.prepare.io.listing import InputFile, Split
from manyhands.prepare.io.reading import check_names, row_locator, shared_types
from manyhands.prepare.records.array_columns import table_of_stacks
from manyhands.prepare.records.chunks import TABLE_CHUNK_BYTES
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk
from manyhands.storage.files import open_to_read


def split_arrays(file: InputFile, form: str, compression: str | None, partition_bytes: int) -> tuple[list[Split], Any]:
    """Divide an array file into ranges of rows. Return the splits, whose `start` and `end` are rows, and the schema."""
    with open_to_read(file.path) as opened:
        layout = read_layout(opened, file.path)
        schema = _table(opened, layout, 0, 1).schema
    return row_splits(file, form, layout.rows, layout.size_bytes, partition_bytes), schema


def row_splits(file: InputFile, form: str, rows: int, size: int, partition_bytes: int) -> list[Split]:
    """Divide the rows of a file, which take `size` bytes, into splits of about `partition_bytes`."""
    count = min(rows, max(1, round(size / partition_bytes)))
    edges = [rows * index // count for index in range(count + 1)] if rows else [0]
    return [
        Split(
            path=file.path,
            format=form,
            compression=None,
            start=start,
            end=end,
            size_bytes=size * (end - start) // rows,
        )
        for start, end in pairwise(edges)
    ]


def read_arrays(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    """Read a range of rows as tables. Raises DataError if the file can't be read or lacks a column."""
    names = None if columns is None else list(columns)
    try:
        with open_to_read(split.path) as file:
            layout = read_layout(file, split.path)
            if names is not None:
                check_names(names, [column.name for column in layout.columns], split.path)
            for start, stop in row_ranges(split.start, split.end, layout.size_bytes // layout.rows):
                table = _table(file, layout, start, stop)
                table = table if names is None else table.select(names)
                yield SourcedChunk(shared_types(table, split, names), row_locator(split.path, start + 1))
    except OSError as error:
        raise DataError(f"an array file can't be read: {error.strerror or error}", where=split.path) from error


def row_ranges(start: int, end: int | None, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Divide the rows of a split into the ranges of its chunks."""
    step = max(1, TABLE_CHUNK_BYTES // max(1, row_bytes))
    for first in range(start, end or 0, step):
        yield first, min(first + step, end or 0)


def array_tables(path: str) -> Iterator[Any]:
    """Yield the rows of an array file as tables."""
    with open_to_read(path) as file:
        layout = read_layout(file, path)
        for start, stop in row_ranges(0, layout.rows, layout.size_bytes // layout.rows):
            yield _table(file, layout, start, stop)


def _table(file: Any, layout: Layout, start: int, stop: int) -> Any:
    found = read_rows(file, layout, start, stop)
    return table_of_stacks({column.name: rows for column, rows in zip(layout.columns, found, strict=True)})
