"""Writes records as arrays: array files for training, and NumPy's npz files. One array [records, ...] for each column.

`manyhands.data.array_format` describes array files. The bytes of a file depend only on its records.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from typing import IO, Any

import numpy as np
import pyarrow as pa

from manyhands.data.array_format import Column, Layout, block_parts, rows_of_block
from manyhands.prepare.io.writing import TableWriter
from manyhands.prepare.records.array_columns import stacks_of


class ArraysWriter(TableWriter):
    """Writes array files, one block of rows after the other. Buffers at most one block beside the current table."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        super().__init__(file, schema, name)
        self._columns: tuple[Column, ...] = ()
        self._block_rows = self._rows = self._buffered = 0
        self._parts: list[list[Any]] = []  # for each column, the rows of the next block

    def check(self, table: pa.Table) -> None:
        """Raise Unfit for a column with a null, or with other values than numbers, times and arrays of these."""
        stacks_of(table)

    def write(self, table: pa.Table) -> None:
        """Write the complete blocks of the rows so far."""
        stacks = stacks_of(table)
        if not self._columns:
            self._columns = tuple(Column(name, str(each.dtype), each.shape[1:]) for name, each in stacks.items())
            self._block_rows = rows_of_block(self._columns)
            self._parts = [[] for _ in self._columns]
        start, total = 0, len(table)
        while start < total:
            stop = min(total, start + self._block_rows - self._buffered)
            for column, parts in zip(self._columns, self._parts, strict=True):
                parts.append(np.ascontiguousarray(stacks[column.name][start:stop], column.dtype))
            self._buffered += stop - start
            start = stop
            if self._buffered == self._block_rows:
                self._write_block()

    def end(self) -> None:
        """Write the last block and the description."""
        if self._buffered:
            self._write_block()
        self._file.write(Layout(self._columns, self._rows, self._block_rows).description())

    def _write_block(self) -> None:
        joined = [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in self._parts]
        for part in block_parts(joined):
            self._file.write(part)
        self._rows += self._buffered
        self._buffered, self._parts = 0, [[] for _ in self._columns]


_SPOOLED_BYTES = 2**23  # a larger column is collected in a temporary file


class NpzWriter(TableWriter):
    """Writes npz files. Their arrays are not compressed, and all times in them are 1980, so that bytes are repeatable.

    An array of an npz file is complete before the next one starts, so the columns are collected in temporary files,
    which have no names, and vanish with the process.
    """

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        super().__init__(file, schema, name)
        self._rows = 0
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._spools: dict[str, Any] = {}

    def check(self, table: pa.Table) -> None:
        """Raise Unfit for a column with a null, or with other values than numbers, times and arrays of these."""
        stacks_of(table)

    def write(self, table: pa.Table) -> None:
        """Append the rows to the temporary files of the columns."""
        for name, stack in stacks_of(table).items():
            rows = np.ascontiguousarray(stack, stack.dtype.newbyteorder("<"))
            if name not in self._spools:
                self._kinds[name] = rows.dtype, rows.shape[1:]
                self._spools[name] = tempfile.SpooledTemporaryFile(_SPOOLED_BYTES)  # noqa: SIM115
            self._spools[name].write(rows.reshape(-1).view(np.uint8))
        self._rows += len(table)

    def end(self) -> None:
        """Write all columns."""
        with zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED) as archive:
            for name, spool in self._spools.items():
                dtype, shape = self._kinds[name]
                entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                with archive.open(entry, "w", force_zip64=True) as member:
                    header = {"descr": dtype.str, "fortran_order": False, "shape": (self._rows, *shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                    spool.seek(0)
                    shutil.copyfileobj(spool, member, 2**20)
        self.abandon()

    def abandon(self) -> None:
        for spool in self._spools.values():
            spool.close()
        self._spools = {}
