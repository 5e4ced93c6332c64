"""Byte-pair vocabularies and encoders.

A vocabulary is trained from counted words, in one process and deterministically (Sennrich, Haddow and Birch, "Neural
Machine Translation of Rare Words with Subword Units", 2016; on bytes, as GPT-2 does). A text is encoded in one of
three ways: as its bytes, with Hugging Face's tokenizers, or with a faster library that gives the same tokens.
"""

from __future__ import annotations

import heapq
import importlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.data.token_format import token_type
from manyhands.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

# GPT-2 defines words as the end of a contraction; letters, digits or other characters with a leading space; white
# space.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

END_OF_TEXT = "<|endoftext|>"

END = 256  # the token for the end of a document; tokens 0 to 255 are the bytes

Pair = tuple[int, int]


class Vocabulary:
    """The names of the tokens, by number, and the merged pairs. The names are the same as in tokenizer files."""

    def __init__(self) -> None:
        self.names = [*_names_of_bytes(), END_OF_TEXT]
        self.merges: list[Pair] = []
        self._ids = {name: number for number, name in enumerate(self.names)}

    def merge(self, pair: Pair) -> int:
        """Merge a pair, and return its token, which is new unless another pair has already produced it."""
        name = self.names[pair[0]] + self.names[pair[1]]
        if name not in self._ids:
            self._ids[name] = len(self.names)
            self.names.append(name)
        self.merges.append(pair)
        return self._ids[name]


def train_bpe(counts: Mapping[str, int], size: int) -> Vocabulary:
    """Train a vocabulary of `size` tokens: the bytes, the end of a document, and merged pairs.

    The most frequent adjacent pair is merged repeatedly. Among equally frequent pairs, the pair with the smallest
    tokens is merged first. Training ends early if no pair occurs twice. counts: the number of occurrences of each word,
    in any order.
    """
    words = [(list(word.encode()), count) for word, count in sorted(counts.items())]
    found: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            found[pair] += count
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in found.items()]
    heapq.heapify(heap)
    vocabulary = Vocabulary()
    while heap and len(vocabulary.names) < size:
        count, pair = heapq.heappop(heap)
        if -count != found[pair]:  # the entry is outdated, because the pair's count has changed
            continue
        if -count < 2:
            break
        changed = _merge(pair, vocabulary.merge(pair), words, found, where)
        for other in changed:
            if found[other] > 0:
                heapq.heappush(heap, (-found[other], other))
    return vocabulary


def _merge(
    pair: Pair, token: int, words: list[tuple[list[int], int]], found: dict[Pair, int], where: dict[Pair, set[int]]
) -> set[Pair]:
    """Replace the pair with the token in all words. Return the pairs whose counts have changed."""
    changed: set[Pair] = set()
    for index in where.pop(pair):
        word, count = words[index]
        for old in pairwise(word):
            found[old] -= count
            changed.add(old)
        merged = _merged(word, pair, token)
        words[index] = (merged, count)
        for new in pairwise(merged):
            found[new] += count
            where[new].add(index)
            changed.add(new)
    found[pair] = 0
    return changed


def _merged(word: list[int], pair: Pair, token: int) -> list[int]:
    merged, position = [], 0
    while position < len(word):
        if word[position] == pair[0] and position + 1 < len(word) and word[position + 1] == pair[1]:
            merged.append(token)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


def tokenizer_json(vocabulary: Vocabulary) -> str:
    """Return the vocabulary as a tokenizer.json of Hugging Face's tokenizers, with byte-level BPE."""
    names = vocabulary.names
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END, "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": [[names[left], names[right]] for left, right in vocabulary.merges],
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _names_of_bytes() -> list[str]:
    """Return the characters that represent the 256 bytes in tokenizer files.

    Visible characters represent themselves.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    names, hidden = [], 0
    for byte in range(END):
        names.append(chr(byte if byte in visible else 0x100 + hidden))
        hidden += byte not in visible
    return names


REFERENCE, FAST = "tokenizers", "gigatoken"


@dataclass(frozen=True)
class ByteEncoder:
    """Encodes each byte of UTF-8 as a token, and the end of each document as another token. Needs no library."""

    vocabulary = END + 1

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Encode a table with the column `text` as a table with the column `tokens`."""
        texts = documents.column("text").to_pylist()
        return _table([np.frombuffer(text.encode(), np.uint8) for text in texts], END, self.vocabulary)


@dataclass(frozen=True)
class TokenizerEncoder:
    """Encodes documents with a tokenizer.json, and adds the token `end` after each document.

    text: the contents of the tokenizer.json. A special token in a document is encoded as plain text. library: the
    library that encodes.
    """

    text: str
    end: int
    vocabulary: int
    library: str = REFERENCE

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Encode a table with the column `text` as a table with the column `tokens`."""
        return _table(self.encode(documents.column("text").to_pylist()), self.end, self.vocabulary)

    def encode(self, texts: list[str]) -> list[NDArray[Any]]:
        """Return the tokens of each text, without `end`."""
        tokenizer = load_tokenizer(self.text)
        if self.library == FAST:  # FAST can't encode a special token as plain text, but the reference can
            library, special = _fast(self.text), _special_tokens(self.text)
            plain = [text for text in texts if not any(token in text for token in special)]
            if len(plain) == len(texts):
                return [np.array(ids, np.uint32) for ids in library.encode_batch_list(texts, parallel=False)]
        return [np.array(one.ids, np.uint32) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encoder_of(text: str, end_of_text: str, where: str) -> TokenizerEncoder:
    """Return the encoder of a tokenizer.json.

    Raises DataError if the file is invalid, and ConfigError if it lacks `end_of_text`.
    """
    tokenizer = load_tokenizer(text, where)
    end = tokenizer.token_to_id(end_of_text)
    if end is None:
        added = [str(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        raise ConfigError(
            f"the tokenizer has no token {end_of_text}",
            where=where,
            expected=f"a token for the end of a document; the special tokens are {', '.join(added[:9]) or 'none'}",
            hint='name the token: [tokenizer] end_of_text = "..."',
        )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return TokenizerEncoder(text, end, largest + 1)


def faster(encoder: TokenizerEncoder, sample: Sequence[str]) -> tuple[TokenizerEncoder, str]:
    """Return an encoder with the faster library, if it is installed and gives the same tokens for `sample`.

    Otherwise return `encoder`. Also return the reason why the faster library is not used, or "".
    """
    quick = TokenizerEncoder(encoder.text, encoder.end, encoder.vocabulary, FAST)
    try:
        found = quick.encode(list(sample))
    except ImportError:
        return encoder, f"{FAST} isn't installed"
    except Exception as error:  # the library raises various errors for unsupported tokenizers
        return encoder, f"{FAST} does not support this tokenizer: {type(error).__name__}: {error}"
    for text, ours, theirs in zip(sample, encoder.encode(list(sample)), found, strict=True):
        if not np.array_equal(ours, theirs):
            return encoder, f"{FAST} gives different tokens for {text[:40]!r}"
    return quick, ""


@lru_cache(maxsize=2)
def load_tokenizer(text: str, where: str | None = None) -> Any:
    """Load a tokenizer with Hugging Face's library.

    Raises ConfigError if the library isn't installed, and DataError for an invalid file.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers already run in parallel
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError:
        raise ConfigError(
            "the tokenizers package isn't installed",
            hint="pip install 'manyhands[text]', or remove [tokenizer], so that every byte is a token",
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exceptions
        raise DataError(f"a tokenizer can't be read: {error}", where=where, expected="a tokenizer.json") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=1)
def _special_tokens(text: str) -> list[str]:
    added = load_tokenizer(text).get_added_tokens_decoder().values()
    return [str(token.content) for token in added]


@lru_cache(maxsize=1)
def _fast(text: str) -> Any:
    library: Any = importlib.import_module(FAST)
    return library.Tokenizer(load_tokenizer(text))


def _table(documents: Sequence[NDArray[Any]], end: int, vocabulary: int) -> pa.Table:
    """Return a table with a column of lists of tokens, one list for each document, with the document's end token."""
    import pyarrow as pa

    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    ends = np.cumsum(lengths)
    values = np.full(int(lengths.sum()), end, token_type(vocabulary))
    for document, start in zip(documents, ends - lengths, strict=True):
        values[start : start + len(document)] = document
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.table({"tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
