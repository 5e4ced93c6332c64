"""Output files of tokens: documents one after the other, and where each ends."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manyhands.data.token_format import padding, tail, token_type
from manyhands.errors import DataError
from manyhands.prepare.chunks import Chunk, num_records, table_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COLUMN = "tokens"
_VOCABULARY = b"vocabulary"


def token_schema(vocabulary: int) -> pa.Schema:
    """Of documents as lists of tokens; for a vocabulary of up to 65,536 tokens, of two bytes each."""
    kind = pa.list_(pa.from_numpy_dtype(token_type(vocabulary)))
    return pa.schema([(_COLUMN, kind)], metadata={_VOCABULARY: str(vocabulary)})


class TokensWriter:
    """Writes a column `tokens` of lists. Without a schema, tokens take four bytes."""

    def __init__(self, file: IO[bytes], schema: pa.Schema | None, name: str) -> None:
        self._file, self._name, self._schema = file, name, schema or token_schema(0)
        self._vocabulary = int((self._schema.metadata or {}).get(_VOCABULARY, 0))
        self._type = token_type(self._vocabulary)
        self._lengths: list[NDArray[np.uint64]] = []
        self._written = 0

    def add(self, chunk: Chunk) -> None:
        """Write the documents of a chunk. Raises DataError for records that aren't lists of tokens."""
        if not num_records(chunk):
            return
        try:
            column = table_of(chunk, self._schema).column(_COLUMN)
        except (DataError, KeyError) as error:
            raise self._unfit(str(error.what if isinstance(error, DataError) else error)) from error
        for part in column.chunks:
            tokens = part.flatten()
            if part.null_count or tokens.null_count:
                raise self._unfit("a document or a token is missing (null)")
            values = tokens.to_numpy(zero_copy_only=False)
            if self._vocabulary and len(values) and int(values.max()) >= self._vocabulary:
                raise self._unfit(f"token {values.max()} is outside of a vocabulary of {self._vocabulary}")
            self._file.write(values.astype(self._type, copy=False).tobytes())
            self._lengths.append(pc.list_value_length(part).to_numpy(zero_copy_only=False).astype(np.uint64))
            self._written += len(values)

    def close(self) -> None:
        """Write where the documents end, and the tail."""
        ends = np.cumsum(np.concatenate(self._lengths), dtype=np.uint64) if self._lengths else np.empty(0, np.uint64)
        self._file.write(bytes(padding(self._written * self._type.itemsize)))
        self._file.write(ends.astype("<u8").tobytes())
        self._file.write(tail(self._written, len(ends), self._vocabulary, self._type.itemsize))

    def _unfit(self, why: Any) -> DataError:
        return DataError(
            f"records can't be written as tokens: {why}",
            where=self._name,
            expected="a column `tokens` of lists of whole numbers",
            hint="map the records to {'tokens': [...]}, one record a document",
        )
