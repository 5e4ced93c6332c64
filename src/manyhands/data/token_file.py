"""TokenFile: prepared tokens as a data set."""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from manyhands.data.output_files import OutputFiles, find_output
from manyhands.data.permutation import Mixture
from manyhands.data.token_format import FOLDER, MANIFEST, TOKENIZER, MappedTokens, map_tokens
from manyhands.errors import ConfigError, DataError
from manyhands.options import whole_number
from manyhands.storage.location import is_local
from manyhands.storage.untrusted import read_inside

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TokenFile(Dataset[Any]):
    """Samples of `length` tokens from a folder that `manyhands prepare` or `Dataset.write(format="tokens")` wrote.

    Item i is a LongTensor [length + 1]: `length` input tokens and one more, because the target of each input token is
    the next token. The last token of an item is also the first of the next item, so no token is a target twice.
    Documents are concatenated. With `boundaries`, an item is a dict of `tokens` and `documents`, both [length + 1].
    `documents` has the number of each token's document, counted from 0 in every item. Use it to restrict attention to
    one document.

    The files are mapped into memory: the workers of a host share one copy, and opening reads only the ends of the
    files. The recipe decides the order of samples, so a TokenFile has no state.
    tokens, documents: the numbers of tokens and documents. vocabulary: the size of the vocabulary, or 0 if unknown.

    Raises DataError if there are no prepared tokens, too few for one item, or incomplete files.
    Raises ConfigError for an invalid length.
    """

    def __init__(self, path: str | Path, length: int, boundaries: bool = False) -> None:
        whole = whole_number(length)
        if whole is None or whole < 1:
            raise ConfigError("length is not an integer of at least 1", got=repr(length))
        self.path, self.length, self.boundaries = str(path), whole, boundaries
        self._output = _output(self.path)
        folder = self._output.folder
        self._files = [_opened(folder / file["name"], file["bytes"]) for file in self._output.listed]
        self._starts = list(accumulate((len(file.tokens) for file in self._files), initial=0))
        self.tokens, self.documents = self._starts[-1], sum(len(file.ends) for file in self._files)
        self.vocabulary = max((file.vocabulary for file in self._files), default=0)
        if len(self) < 1:
            raise DataError(
                "there are too few tokens for one item",
                where=str(folder),
                expected=f"at least {length + 1}",
                got=self.tokens,
                hint="use a smaller length, or prepare more data",
            )

    @classmethod
    def mixed(
        cls,
        weights: Mapping[str, float],
        length: int,
        samples: int | None = None,
        boundaries: bool = False,
        seed: int = 0,
    ) -> Mixture:
        """Combine several corpora into one data set, with samples in proportion to the corpora's weights.

        weights: the weight of each corpus, by path. samples: the number of samples in an epoch; by default the number
        of samples in all corpora. Use the number that the run will take (steps x global_size), so that no sample is
        repeated unnecessarily. A corpus with fewer samples than its share is repeated in another order. If a corpus has
        more samples than its share, `seed` decides which are used.
        Raises ConfigError for weights that are not positive, and DataError for corpora with different tokens.
        """
        parts = {str(path): cls(path, length, boundaries) for path in weights}
        kinds = {path: _kind_of_tokens(path, part.vocabulary) for path, part in parts.items()}
        if len(set(kinds.values())) > 1:
            raise DataError(
                "corpora with different tokens can't be mixed",
                got=", ".join(f"{path}: {kind}" for path, kind in kinds.items()),
                hint="prepare all corpora with the same tokenizer: [tokenizer] file = ...",
            )
        return Mixture(list(parts.values()), list(weights.values()), samples, seed)

    def __len__(self) -> int:
        return max(0, self.tokens - 1) // self.length

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} is outside of a token file of {len(self)} items")
        start = index * self.length
        pieces = self._pieces(start, start + self.length + 1)
        tokens = _long([file.tokens[low:high] for file, low, high in pieces])
        if not self.boundaries:
            return tokens
        return {"tokens": tokens, "documents": _long(_document_numbers(pieces))}

    @property
    def digest(self) -> str:
        """Return a hash of the checksums that the files had when they were prepared. Runs record it."""
        return self._output.digest

    def verify(self) -> None:
        """Read all files and check their SHA-256 checksums. Raises DataError, which names a file that has changed."""
        changed = self._output.changed()
        if changed is not None:
            raise DataError(
                "a token file has changed since it was prepared",
                where=str(changed[0]),
                expected=f"SHA-256 {changed[1]}",
                got=changed[2],
                hint="prepare the data again",
            )

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling a memory map would copy all tokens, so a loader process opens the files itself.
        return type(self), (self.path, self.length, self.boundaries)

    def _pieces(self, start: int, stop: int) -> list[tuple[MappedTokens, int, int]]:
        """Return the files that hold tokens [start, stop), and the range of these tokens in each file."""
        pieces = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            low, end = start - self._starts[number], min(stop, self._starts[number + 1])
            if end > start:
                pieces.append((self._files[number], low, end - self._starts[number]))
            start, number = max(start, end), number + 1
        return pieces


def _long(parts: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _document_numbers(pieces: list[tuple[MappedTokens, int, int]]) -> list[NDArray[Any]]:
    """Return the number of each token's document, counted from 0. No document spans two files."""
    numbers, first = [], 0
    for file, low, high in pieces:
        found = np.searchsorted(file.ends, np.arange(low, high, dtype=np.uint64), side="right")
        found = np.unique(found, return_inverse=True)[1] + first  # don't number empty documents
        numbers.append(found)
        first = int(found[-1]) + 1
    return numbers


def _output(path: str) -> OutputFiles:
    """Return the token files of a corpus. Raises DataError."""
    if not is_local(path):
        raise DataError(
            "token files are mapped into memory, so they must be on a disk", where=path, hint="copy them to a disk"
        )
    found = find_output([Path(path, FOLDER), Path(path)], MANIFEST)
    if found is None:
        raise DataError(
            "there are no prepared tokens here",
            where=str(Path(path).absolute()),
            expected=f"a folder with {FOLDER}/{MANIFEST} or {MANIFEST} (written when the preparation is complete)",
            hint="prepare them first: manyhands prepare RECIPE.toml --out FOLDER"
            + ("" if Path(path).is_absolute() else "; a relative path is relative to the working directory"),
        )
    if not found.are_plain:
        raise DataError(
            "the manifest of a corpus names something that is not a file of its folder",
            where=str(found.folder / MANIFEST),
            hint="prepare the data again; don't use a corpus that you do not trust",
        )
    return found


def _kind_of_tokens(path: str, vocabulary: int) -> str:
    """Describe the tokenizer: the size of its vocabulary, and a hash of its file if the file is next to the tokens."""
    try:
        tokenizer = hashlib.sha256(read_inside(Path(path) / TOKENIZER)).hexdigest()[:8]
    except OSError:
        return f"a vocabulary of {vocabulary}"
    return f"a vocabulary of {vocabulary}, {TOKENIZER} {tokenizer}"


def _opened(path: Path, num_bytes: int) -> MappedTokens:
    try:
        if path.stat().st_size != num_bytes:
            raise DataError(
                "the size of a token file has changed since it was written",
                where=str(path),
                expected=f"{num_bytes:,} bytes",
                got=f"{path.stat().st_size:,}",
                hint="prepare the data again",
            )
        return map_tokens(str(path))
    except OSError as error:
        raise DataError(f"a token file can't be read: {error.strerror or error}", where=str(path)) from error
