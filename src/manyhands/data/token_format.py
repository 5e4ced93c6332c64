"""The format of token files on disk. Does not import torch.

    tokens, uint16 or uint32 | padding to a multiple of 8 | end of each document, uint64 | tail

All numbers are little-endian. The end of a document is counted in tokens from the start of the file. No document spans
two files. The tail holds the number of tokens, the number of documents, the size of the vocabulary (0 if unknown), the
number of bytes per token, and a fixed text that identifies the format.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from manyhands.errors import DataError
from manyhands.storage.untrusted import open_inside

if TYPE_CHECKING:
    from numpy.typing import NDArray


FOLDER = "tokens"  # inside the folder of a corpus, which also has the tokenizer and the data card

HELD_OUT = "validation"  # beside FOLDER, with the documents that are held out

TOKENIZER = "tokenizer.json"

MANIFEST = "_manifest.json"

_TAIL = struct.Struct("<QQQQ16s")

_MAGIC = b"manyhands tokens"

_ALIGNMENT = 8


class MappedTokens(NamedTuple):
    """A token file, mapped into memory. tokens: [tokens]. ends: the end of each document, [documents]."""

    tokens: NDArray[np.integer]
    ends: NDArray[np.integer]
    vocabulary: int


def token_type(vocabulary: int) -> np.dtype[np.integer]:
    """Return the smallest type that holds every token of a vocabulary of this size, or uint32 if the size is 0
    (unknown).
    """
    return np.dtype("<u2") if 0 < vocabulary <= 2**16 else np.dtype("<u4")


def padding(num_bytes: int) -> int:
    """Return the number of padding bytes after `num_bytes` of tokens."""
    return -num_bytes % _ALIGNMENT


def tail(num_tokens: int, num_documents: int, vocabulary: int, token_bytes: int) -> bytes:
    """Return the tail of a token file."""
    return _TAIL.pack(num_tokens, num_documents, vocabulary, token_bytes, _MAGIC)


def map_tokens(path: str) -> MappedTokens:
    """Map a token file into memory, and read only its tail. Raises DataError if the file is incomplete, and OSError."""
    with open_inside(Path(path).parent, Path(path).name) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL.size))
        last = file.read(_TAIL.size)
    try:
        num_tokens, num_documents, vocabulary, token_bytes, magic = _TAIL.unpack(last)
    except struct.error:
        magic = b""
    if magic != _MAGIC or token_bytes not in (2, 4):
        raise DataError("a token file is truncated, or is not a token file", where=path, hint="prepare the data again")
    ends_at = num_tokens * token_bytes + padding(num_tokens * token_bytes)
    expected = ends_at + 8 * num_documents + _TAIL.size
    if size != expected:
        raise DataError(
            "the size of a token file does not match its tail",
            where=path,
            expected=f"{expected:,} bytes",
            got=f"{size:,}",
            hint="prepare the data again",
        )
    tokens = _mapped(path, np.dtype(f"<u{token_bytes}"), 0, num_tokens)
    return MappedTokens(tokens, _mapped(path, np.dtype("<u8"), ends_at, num_documents), vocabulary)


def _mapped(path: str, kind: np.dtype[np.integer], offset: int, count: int) -> NDArray[np.integer]:
    return (
        np.memmap(path, kind, "r", offset, (count,)) if count else np.empty(0, kind)
    )  # an empty range can't be mapped
