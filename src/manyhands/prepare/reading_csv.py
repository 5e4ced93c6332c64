"""Reads CSV files: every column is text, as it stands there, unless `types` says otherwise."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from io import TextIOWrapper
from itertools import count, islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from manyhands.errors import DataError
from manyhands.prepare.bad_records import BadRecords
from manyhands.prepare.chunks import CHUNK_BYTES
from manyhands.prepare.listing import Split
from manyhands.prepare.pipeline import Piece

_BLOCK_BYTES = 2**24  # that are parsed at once: a row must lie in two of them


def read_csv(
    split: Split,
    bad: BadRecords,
    types: Mapping[str, str],
    opened: Callable[[Split], AbstractContextManager[IO[bytes]]],
) -> Iterator[Piece]:
    """The rows of a file, as tables. Rows with too many or too few fields, or that `types` don't fit, are set aside."""
    wrong: list[Any] = []

    def put_aside(row: Any) -> str:
        wrong.append(row)
        return "skip"

    try:
        with opened(split) as file:
            names = _names(split, types, opened)
            reader = pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=put_aside),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
            numbers = _numbers(wrong)
            for batch in reader:
                for row in wrong:
                    what = f"the row has {row.actual_columns} fields where {row.expected_columns} are expected"
                    bad.add(f"{split.path}, row {row.number}", what, row.text)
                rows = list(islice(numbers, batch.num_rows))
                table, step = pa.Table.from_batches([batch]), max(1, len(rows) * CHUNK_BYTES // max(1, batch.nbytes))
                for start in range(0, len(rows), step):
                    part = table.slice(start, step)
                    yield _typed(part, rows[start : start + step], types, split.path, bad)
                wrong.clear()
    except pa.ArrowException as error:
        raise DataError(f"a CSV file can't be read: {error}", where=split.path) from error


def _names(
    split: Split, types: Mapping[str, str], opened: Callable[[Split], AbstractContextManager[IO[bytes]]]
) -> list[str]:
    with opened(split) as file:
        text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
        names = next(csv.reader(text), [])
        text.detach()  # the file is closed by who opened it
    unknown = [name for name in types if name not in names]
    if unknown:
        raise DataError(f"there is no column {unknown[0]!r}", where=split.path, expected=f"one of {', '.join(names)}")
    return names


def _numbers(wrong: list[Any]) -> Iterator[int]:
    """The numbers of the rows that are read (the header is row 1): all but those that are set aside."""
    for number in count(2):
        if not any(row.number == number for row in wrong):
            yield number


def _typed(table: pa.Table, rows: list[int], types: Mapping[str, str], path: str, bad: BadRecords) -> Piece:
    """Columns as `types` say, an empty field as null; rows that don't fit are set aside."""
    for name, type_name in types.items():
        kind = pa.type_for_alias(type_name)
        texts = table.column(name)
        texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
        try:
            values = pc.cast(texts, kind)
        except pa.ArrowInvalid:
            values, kept = [], []
            for index, text in enumerate(texts):
                try:
                    values.append(text.cast(kind))
                    kept.append(index)
                except pa.ArrowInvalid as error:
                    row = table.slice(index, 1).to_pylist()[0]
                    bad.add(
                        f"{path}, row {rows[index]}", f"a field of {name!r} doesn't fit its type: {error}", str(row)
                    )
            table, rows = table.take(kept), [rows[index] for index in kept]
            values = pa.array([value.as_py() for value in values], kind)
        table = table.set_column(table.column_names.index(name), name, values)
    return Piece(table, lambda index: f"{path}, row {rows[index]}")
