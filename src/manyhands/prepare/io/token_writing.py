"""Writes token files, which hold the tokens of all documents in sequence, and the positions where documents end.

`manyhands.data.token_format` describes the format.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.data.token_format import padding, tail, token_type
from manyhands.errors import DataError
from manyhands.prepare.io.writing import Writer, record_place
from manyhands.prepare.records.chunks import Chunk, num_records, table_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COLUMN = "tokens"

_VOCABULARY = b"vocabulary"


def token_schema(vocabulary: int) -> pa.Schema:
    """Return the schema of documents as lists of tokens.

    vocabulary: the number of different tokens, or 0 if unknown. A token takes two bytes if the number is known and at
    most 65,536, and four bytes otherwise.
    """
    kind = pa.list_(pa.from_numpy_dtype(token_type(vocabulary)))
    return pa.schema([(_COLUMN, kind)], metadata={_VOCABULARY: str(vocabulary)})


class TokensWriter(Writer):
    """Writes the column `tokens`, one list per document, as a token file. Without a schema, tokens take four bytes."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file, self._name, self._schema = file, name, schema or token_schema(0)
        self._vocabulary = int((self._schema.metadata or {}).get(_VOCABULARY, 0))
        self._type = token_type(self._vocabulary)
        self._lengths: list[NDArray[np.uint64]] = []
        self._written = 0

    def add(self, chunk: Chunk) -> None:
        """Write the documents of a chunk. Raises DataError if a record has no list of tokens in `tokens`."""
        if not num_records(chunk):
            return
        try:
            column = table_of(chunk, self._schema).column(_COLUMN)
        except (DataError, KeyError) as error:
            reason = self._invalid(str(error.what if isinstance(error, DataError) else error))
            if isinstance(error, DataError):
                reason.where, reason.got = record_place(self._name, sum(map(len, self._lengths)), error), error.got
            raise reason from error
        for part in column.chunks:
            tokens = part.flatten()
            if part.null_count or tokens.null_count:
                raise self._invalid("a document or a token is missing (null)")
            values = tokens.to_numpy(zero_copy_only=False)
            if self._vocabulary and len(values) and int(values.max()) >= self._vocabulary:
                raise self._invalid(f"token {values.max()} is outside the vocabulary of {self._vocabulary} tokens")
            self._file.write(values.astype(self._type, copy=False).tobytes())
            self._lengths.append(pc.list_value_length(part).to_numpy(zero_copy_only=False).astype(np.uint64))
            self._written += len(values)

    def close(self) -> None:
        """Write the ends of the documents and the tail. The file stays open."""
        ends = np.cumsum(np.concatenate(self._lengths), dtype=np.uint64) if self._lengths else np.empty(0, np.uint64)
        self._file.write(bytes(padding(self._written * self._type.itemsize)))
        self._file.write(ends.astype("<u8").tobytes())
        self._file.write(tail(self._written, len(ends), self._vocabulary, self._type.itemsize))

    def _invalid(self, reason: Any) -> DataError:
        return DataError(
            f"records can't be written as tokens: {reason}",
            where=self._name,
            expected="a column `tokens` of lists of integers",
            hint="map the records to {'tokens': [...]}, one record per document",
        )
