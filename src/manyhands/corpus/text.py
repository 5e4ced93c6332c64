"""Cleaning rules, and small functions on documents.

Cleaning documents: one form of Unicode, and rules that hold for any language. Plain functions of a text.

Small functions of documents, for jobs: their words, examples of them, which are whose duplicates.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from manyhands.corpus.tokenizing import WORDS
from manyhands.errors import ConfigError, DataError
from manyhands.prepare.records.aggregate import Aggregate

FORMS = ("NFC", "NFKC", "none")

KEPT = ""  # the rule of documents that no rule drops

EXAMPLE_CHARACTERS = 400  # of a dropped document that are kept, to be shown

# Control characters but tab and line feed, marks of byte order, lone surrogates, and what Unicode says is no character.
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def in_one_form(text: str, form: str) -> str:
    """The text in a normal form of Unicode, with line feeds as line ends and without control characters."""
    text = _UNWANTED.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text if form == "none" else unicodedata.normalize(form, text)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which documents are dropped. Shares are of characters, from 0 to 1.

    min_characters, max_characters: its length. min_letters: letters, marks and digits of all that isn't white space.
    max_replaced: U+FFFD, which stands for what somebody couldn't decode. max_repeated_lines: in lines that have come
    before in the document (Rae et al., "Scaling Language Models", 2021, table A1, there 0.2). max_line: the mean line.
    """

    min_characters: int = 50
    max_characters: int = 1_000_000
    min_letters: float = 0.5
    max_replaced: float = 0.001
    max_repeated_lines: float = 0.3
    max_line: int = 10_000

    def broken_by(self, text: str) -> str:
        """The name of the first rule that drops the text; `KEPT` if none does."""
        length = len(text)
        if length < self.min_characters:
            return "min_characters"
        if length > self.max_characters:
            return "max_characters"
        if text.count("\ufffd") > self.max_replaced * length:
            return "max_replaced"
        if _share_of_letters(text) < self.min_letters:
            return "min_letters"
        lines = text.split("\n")
        if length > self.max_line * len(lines):
            return "max_line"
        if _repeated(lines) > self.max_repeated_lines * length:
            return "max_repeated_lines"
        return KEPT


def _share_of_letters(text: str) -> float:
    letters = visible = 0
    for character, count in Counter(text).items():
        if not character.isspace():
            visible += count
            letters += count * (unicodedata.category(character)[0] in "LMN")
    return letters / visible if visible else 0.0


def _repeated(lines: list[str]) -> int:
    """How many characters are in lines that have come before; lines of up to 3 (brackets, say) don't count."""
    counts = Counter(stripped for line in lines if len(stripped := line.strip()) > 3)
    return sum((count - 1) * len(line) for line, count in counts.items())


@dataclass(frozen=True)
class Judge:
    """From a record to a document: `id`, `text`, `characters`, and the `rule` that drops it.

    id: 16 bytes that stand for the text (BLAKE2b), so that equal documents have equal ones.
    """

    column: str
    form: str
    rules: Rules

    def __call__(self, record: Any) -> dict[str, Any]:
        """Raises DataError for a record that has no text."""
        text = record if isinstance(record, str) else record.get(self.column) if isinstance(record, dict) else None
        if not isinstance(text, str):
            known = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"the record has no text in column {self.column!r}", got=known)
        text = in_one_form(text, self.form)
        rule = self.rules.broken_by(text)
        return {
            "id": hashlib.blake2b(text.encode(), digest_size=16).digest(),
            "text": text if rule == KEPT else text[:EXAMPLE_CHARACTERS],
            "characters": len(text),
            "rule": rule,
        }


def is_kept(document: dict[str, Any]) -> bool:
    """No rule drops it."""
    return bool(document["rule"] == KEPT)


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
