"""From texts to tokens: bytes, Hugging Face's tokenizers, or a faster library that was found to give the same."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.corpus.bpe import END
from manyhands.data.token_format import token_type
from manyhands.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

REFERENCE, FAST = "tokenizers", "gigatoken"


@dataclass(frozen=True)
class ByteEncoder:
    """A token a byte of UTF-8, and one for the end of each document. Needs no other library."""

    vocabulary = END + 1

    def __call__(self, documents: pa.Table) -> pa.Table:
        """A table of `tokens` for one with `text`."""
        texts = documents.column("text").to_pylist()
        return _table([np.frombuffer(text.encode(), np.uint8) for text in texts], END, self.vocabulary)


@dataclass(frozen=True)
class TokenizerEncoder:
    """The tokens of a tokenizer.json, whose text this holds, and `end` after each document.

    What looks like a special token in a text is text. library: what encodes.
    """

    text: str
    end: int
    vocabulary: int
    library: str = REFERENCE

    def __call__(self, documents: pa.Table) -> pa.Table:
        """A table of `tokens` for one with `text`."""
        return _table(self.encode(documents.column("text").to_pylist()), self.end, self.vocabulary)

    def encode(self, texts: list[str]) -> list[NDArray[Any]]:
        """The tokens of each text, without `end`."""
        tokenizer = load_tokenizer(self.text)
        if self.library == FAST:  # which takes what looks like a special token for one: such texts aren't for it
            library, special = _fast(self.text), _special_tokens(self.text)
            plain = [text for text in texts if not any(token in text for token in special)]
            if len(plain) == len(texts):
                return [np.array(ids, np.uint32) for ids in library.encode_batch_list(texts, parallel=False)]
        return [np.array(one.ids, np.uint32) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encoder_of(text: str, end_of_text: str, where: str) -> TokenizerEncoder:
    """The encoder of a tokenizer.json. Raises DataError for what isn't one, ConfigError for another `end_of_text`."""
    tokenizer = load_tokenizer(text, where)
    end = tokenizer.token_to_id(end_of_text)
    if end is None:
        added = [str(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        raise ConfigError(
            f"the tokenizer has no token {end_of_text}",
            where=where,
            expected=f"the token for a document's end; its special tokens are {', '.join(added[:9]) or 'none'}",
            hint='say it: [tokenizer] end_of_text = "..."',
        )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return TokenizerEncoder(text, end, largest + 1)


def faster(encoder: TokenizerEncoder, sample: Sequence[str]) -> tuple[TokenizerEncoder, str]:
    """The encoder with the faster library, if it is installed and gives the same tokens for a sample; and why not."""
    quick = TokenizerEncoder(encoder.text, encoder.end, encoder.vocabulary, FAST)
    try:
        found = quick.encode(list(sample))
    except ImportError:
        return encoder, f"{FAST} isn't installed"
    except Exception as error:  # whatever a young library raises for a tokenizer that it doesn't know
        return encoder, f"{FAST} can't take this tokenizer: {type(error).__name__}: {error}"
    for text, ours, theirs in zip(sample, encoder.encode(list(sample)), found, strict=True):
        if not np.array_equal(ours, theirs):
            return encoder, f"{FAST} gives other tokens for {text[:40]!r}"
    return quick, ""


@lru_cache(maxsize=2)
def load_tokenizer(text: str, where: str | None = None) -> Any:
    """A tokenizer of Hugging Face's library. Raises ConfigError without that, DataError for a broken file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    try:
        tokenizers: Any = importlib.import_module("tokenizers")
    except ImportError:
        raise ConfigError(
            "the tokenizers package isn't installed",
            hint="pip install 'manyhands[text]'; or leave [tokenizer] out: every byte is a token then",
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
    """Documents as a column of lists, each with its end token."""
    import pyarrow as pa

    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    ends = np.cumsum(lengths)
    values = np.full(int(lengths.sum()), end, token_type(vocabulary))
    for document, start in zip(documents, ends - lengths, strict=True):
        values[start : start + len(document)] = document
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.table({"tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
