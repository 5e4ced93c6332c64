"""Finds the rows of a CSV file, their lines, and wrong quotes.

The rules are those of RFC 4180. A field that starts with a quote ends at the next quote that isn't doubled, and may
contain line ends. A delimiter or a line end must follow the field. Any other quote is an ordinary character. A line
ends with LF, CRLF or CR. Empty lines are not rows.

numpy checks all quotes of a block in one pass. Only blocks in which this finds an unusual quote are scanned row by row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manyhands.errors import DataError
from manyhands.formatting import format_bytes

_WINDOW_BYTES = 2**20  # positions of quotes and lines are computed for this many bytes at a time, to limit memory

_QUOTE, _COMMA, _LF, _CR = b'",\n\r'

# The bytes that may precede an opening quote or follow a closing quote. A doubled quote both closes and opens a field.
_NEXT_TO_QUOTE = np.zeros(256, bool)
_NEXT_TO_QUOTE[[_QUOTE, _COMMA, _LF, _CR]] = True

_QUOTED = re.compile(rb'"[^"]*+(?:""[^"]*+)*+"')
_UNQUOTED = re.compile(rb"[^,\r\n]*+")
_LINE_END = re.compile(rb"\r\n|\r|\n")

Positions = NDArray[np.int64]


class ScannedRow(NamedTuple):
    """A row that starts at a known position.

    end: the position after its line end, or None if the row is not complete. fields: the start and end of each field.
    quote: the position of a wrong quote, which is not closed, or which closes a field but is followed by text.
    """

    end: int | None
    fields: list[tuple[int, int]]
    quote: int | None


def scan_row(data: bytes, start: int, *, final: bool) -> ScannedRow:
    """Scan the row that starts at `start`. final: True if nothing follows `data`."""
    fields: list[tuple[int, int]] = []
    position, wrong = start, None
    while True:
        field = position
        if data.startswith(b'"', position):
            closed = _QUOTED.match(data, position)
            if closed is None or (closed.end() == len(data) and not final):
                return ScannedRow(None, fields, position)
            position = closed.end()
            if position < len(data) and not _NEXT_TO_QUOTE[data[position]] and wrong is None:
                wrong = field
        rest = _UNQUOTED.match(data, position)
        position = position if rest is None else rest.end()
        fields.append((field, position))
        if position == len(data):
            return ScannedRow(position if final else None, fields, wrong)
        if data[position] != _COMMA:
            break
        position += 1
    if data[position] == _CR and position + 1 == len(data) and not final:
        return ScannedRow(None, fields, wrong)  # LF may follow the CR
    return ScannedRow(position + (2 if data.startswith(b"\r\n", position) else 1), fields, wrong)


def field_text(data: bytes, field: tuple[int, int]) -> bytes:
    """Return the content of a field without its quotes."""
    text = data[field[0] : field[1]]
    return text[1:-1].replace(b'""', b'"') if text[:1] == b'"' else text


def count_lines(data: bytes, start: int = 0, end: int | None = None) -> int:
    """Return the number of line ends in this part of the data. CRLF is a single line end."""
    stop = len(data) if end is None else end
    returns = data.count(b"\r", start, stop)
    return data.count(b"\n", start, stop) + (returns - data.count(b"\r\n", start, stop) if returns else 0)


@dataclass(frozen=True)
class RowBlock:
    """Complete rows of a CSV file.

    data: the bytes of the rows. first_line: the number of the line on which they start. wrong: the start and end of
    each row with a wrong quote. spanning: the start and end of each row that extends over several lines. It is None if
    all quotes of the block are regular, because the number of quotes before a line end then shows whether it ends a
    row.
    """

    data: bytes
    first_line: int
    wrong: tuple[tuple[int, int], ...] = ()
    spanning: tuple[tuple[int, int], ...] | None = None

    @property
    def lines(self) -> int:
        """Return the number of lines. The last line of a file may have no line end."""
        return count_lines(self.data) + (self.data[-1:] not in (b"\n", b"\r", b""))

    def starts(self) -> tuple[Positions, Positions]:
        """Return the position and the line number of each row, including rows with a wrong quote."""
        positions, numbers = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
        array, lines, inside = np.frombuffer(self.data, np.uint8), 0, False
        for start, window, quotes in _windows(array):
            ends = np.flatnonzero((window == _LF) | (window == _CR)) + start
            following = array[np.minimum(ends + 1, len(array) - 1)]
            ends = ends[~((array[ends] == _CR) & (following == _LF) & (ends + 1 < len(array)))]
            count, lines = np.arange(lines + 1, lines + 1 + len(ends)), lines + len(ends)
            if self.spanning is None and len(quotes) + inside:
                outside = (np.searchsorted(quotes, ends) + inside) % 2 == 0
                ends, count = ends[outside], count[outside]
            inside ^= bool(len(quotes) % 2)
            positions.append(ends + 1)
            numbers.append(count)
        at, number = np.concatenate(positions), np.concatenate(numbers) + self.first_line
        keep = at < len(array)
        keep[keep] = (array[at[keep]] != _LF) & (array[at[keep]] != _CR)
        if self.spanning:
            row_starts, row_ends = np.array(self.spanning, np.int64).T
            row = np.searchsorted(row_starts, at, side="left") - 1
            keep &= ~((row >= 0) & (at < row_ends[row]))
        return at[keep], number[keep]


class BlockReader:
    """Reads a stream in blocks of `block_bytes`. Only the last block is smaller."""

    def __init__(self, file: IO[bytes], block_bytes: int) -> None:
        self._file, self._block_bytes, self._next = file, block_bytes, b""
        self.max_row_bytes = 2 * block_bytes

    def read(self) -> tuple[bytes, bool]:
        """Return the next block, and True if it is the last block."""
        parts, missing = [self._next], self._block_bytes + 1 - len(self._next)
        while missing and (part := self._file.read(missing)):
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        self._next = data[self._block_bytes :]
        return data[: self._block_bytes], not self._next


def row_blocks(data: bytes, reader: BlockReader, first_line: int, path: str, *, final: bool) -> Iterator[RowBlock]:
    """Yield all rows of a CSV file: first the complete rows of `data`, then the rows that each block completes.

    first_line: the number of the line on which `data` starts. final: True if `data` is the end of the file. Raises
    DataError if a quote is not closed, if text follows the closing quote of a field with several lines, or if a row is
    longer than two blocks. In these cases it is unknown how many rows the field contains.
    """
    while True:
        end, block = _complete_rows(data, first_line, path, final=final)
        if end:
            yield block
            first_line += block.lines
        if final:
            return
        data = data[end:]
        if len(data) >= reader.max_row_bytes:
            raise DataError(
                "a row of a CSV file is too long",
                where=f"{path}, line {first_line}",
                expected=f"less than {format_bytes(reader.max_row_bytes)}",
                got=_shown(data, 0),
                hint="close the quote that is probably open, or double quotes inside a quoted field",
            )
        more, final = reader.read()
        data += more


def _complete_rows(data: bytes, first_line: int, path: str, *, final: bool) -> tuple[int, RowBlock]:
    """Return the end of the last complete row (0 if there is none), and the block of the rows up to it."""
    if b'"' not in data:
        end = len(data) if final else _after_last_line_end(data, 0, len(data) - data.endswith(b"\r"))
        return end, RowBlock(data[:end], first_line)
    regular = _end_of_regular_rows(data, final=final)
    if regular is not None:
        return regular, RowBlock(data[:regular], first_line)
    return _scanned_rows(data, first_line, path, final=final)


def _after_last_line_end(data: bytes, start: int, stop: int) -> int:
    return max(data.rfind(b"\n", start, stop), data.rfind(b"\r", start, stop)) + 1


def _windows(array: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8], Positions]]:
    """Yield parts of a block: their start, their bytes, and the positions of their quotes in the block."""
    for start in range(0, len(array), _WINDOW_BYTES):
        window = array[start : start + _WINDOW_BYTES]
        yield start, window, np.flatnonzero(window == _QUOTE) + start


def _end_of_regular_rows(data: bytes, *, final: bool) -> int | None:
    """Return the end of the last complete row if each quote opens, closes or is doubled, and otherwise None."""
    array = np.frombuffer(data, np.uint8)
    last, end, inside = len(array) - 1, 0, False
    stop = len(array) - (not final and data.endswith(b"\r"))  # LF may follow the CR
    for start, window, quotes in _windows(array):
        opening, closing = quotes[int(inside) :: 2], quotes[int(not inside) :: 2]
        before, after = array[np.maximum(opening - 1, 0)], array[np.minimum(closing + 1, last)]
        if not (_NEXT_TO_QUOTE[before].all() and _NEXT_TO_QUOTE[after].all()):
            return None
        # Search the gaps between quotes backward for the last line end that is outside of quotes.
        count, limit = len(quotes), min(start + len(window), stop)
        for gap in range(count - (count + inside) % 2, -1, -2):
            left = int(quotes[gap - 1]) + 1 if gap else start
            found = _after_last_line_end(data, left, int(quotes[gap]) if gap < count else limit)
            if found:
                end = found
                break
        inside ^= bool(len(quotes) % 2)
    if final:
        return None if inside else len(data)
    return end


def _scanned_rows(data: bytes, first_line: int, path: str, *, final: bool) -> tuple[int, RowBlock]:
    """Return the results of `_complete_rows`, by scanning each row that has a quote."""
    position = 0
    wrong: list[tuple[int, int]] = []
    spanning: list[tuple[int, int]] = []
    while position < len(data):
        quote = data.find(b'"', position)
        if quote < 0:
            position = (
                len(data)
                if final
                else max(position, _after_last_line_end(data, position, len(data) - data.endswith(b"\r")))
            )
            break
        position = max(position, _after_last_line_end(data, position, quote))
        row = scan_row(data, position, final=final)
        if row.quote is not None:
            _check_quote(data, position, row, first_line, path, final=final)
        if row.end is None:
            break
        if row.quote is not None:
            wrong.append((position, row.end))
        last = data[row.end - 1 : row.end] in (b"\n", b"\r")
        if count_lines(data, position, row.end) > last:
            spanning.append((position, row.end))
        position = row.end
    return position, RowBlock(data[:position], first_line, tuple(wrong), tuple(spanning))


def _check_quote(data: bytes, start: int, row: ScannedRow, first_line: int, path: str, *, final: bool) -> None:
    """Raise DataError if the wrong quote of a row spans lines, because it is unknown how many records these lines
    hold.
    """
    quote = start if row.quote is None else row.quote
    # This runs for every row with a wrong quote. Count lines only for an error, because counting for each row takes
    # quadratic time.
    hint = "correct the file: double each quote inside a quoted field"
    closed = _QUOTED.match(data, quote)
    if closed is None:
        if final:
            where = f"{path}, line {first_line + count_lines(data, 0, quote)}"
            raise DataError("a quote of a CSV file is not closed", where=where, got=_shown(data, start), hint=hint)
    elif row.end is not None and _LINE_END.search(data, quote, closed.end()):
        line = first_line + count_lines(data, 0, quote)
        last_line = line + count_lines(data, quote, closed.end())
        raise DataError(
            "text follows the closing quote of a CSV field that has several lines",
            where=f"{path}, line {line} to {last_line}",
            got=_shown(data, start),
            hint=f"{hint}; probably the field's first quote is not closed, and the lines after it are rows",
        )


def _shown(data: bytes, start: int) -> str:
    return data[start : start + 200].decode(errors="backslashreplace")
