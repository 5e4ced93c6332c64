"""Small functions of documents, for jobs: their words, examples of them, which are whose duplicates."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from manyhands.corpus.bpe import WORDS
from manyhands.corpus.clean import EXAMPLE_CHARACTERS
from manyhands.errors import ConfigError
from manyhands.prepare.aggregate import Aggregate

EXAMPLES = 3


def words_of(document: dict[str, Any]) -> list[str]:
    """Its words, as byte-level BPE cuts them before it merges. Raises ConfigError without the package regex."""
    found: list[str] = _pattern().findall(document["text"])
    return found


@lru_cache(maxsize=1)
def _pattern() -> Any:
    try:
        return importlib.import_module("regex").compile(WORDS)
    except ImportError:
        raise ConfigError(
            "the regex package isn't installed",
            hint="pip install 'manyhands[text]'; or leave [tokenizer] vocabulary out: every byte is a token then",
        ) from None


def some_examples() -> Aggregate:
    """The beginnings of the documents with the least ids: some that seem chosen at random, always the same."""
    return Aggregate(start=_example, add=_one_more, merge=_both, finish=_texts)


def beginning(document: dict[str, Any]) -> dict[str, Any]:
    """The document, with no more of its text than an example shows."""
    return {**document, "text": document["text"][:EXAMPLE_CHARACTERS]}


def is_twice(group: dict[str, Any]) -> bool:
    """More than one document has the key."""
    return bool(group["documents"] > 1)


@dataclass(frozen=True)
class IsAmong:
    """Whether a document's id is one of these."""

    ids: frozenset[bytes]

    def __call__(self, document: dict[str, Any]) -> bool:
        return document["id"] in self.ids


def nothing(_: Any) -> int:
    """The same key for all."""
    return 0


def _example(document: dict[str, Any]) -> list[tuple[bytes, str]]:
    return [(document["id"], document["text"][:EXAMPLE_CHARACTERS])]


def _one_more(found: list[tuple[bytes, str]], document: dict[str, Any]) -> list[tuple[bytes, str]]:
    if len(found) == EXAMPLES and document["id"] >= found[-1][0]:
        return found
    return _both(found, _example(document))


def _both(found: Iterable[tuple[bytes, str]], more: Iterable[tuple[bytes, str]]) -> list[tuple[bytes, str]]:
    return sorted({*found, *more})[:EXAMPLES]


def _texts(found: list[tuple[bytes, str]]) -> list[str]:
    return [text for _, text in found]
