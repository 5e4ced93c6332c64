"""Cleaning rules, and small functions on documents.

Cleaning normalizes Unicode, and applies rules that hold for any language.
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
from manyhands.options import check_options, option, options
from manyhands.prepare.records.aggregate import Aggregate

FORMS = ("NFC", "NFKC", "none")

NO_RULE = ""
"""The `rule` of documents that no rule drops."""

EXAMPLE_CHARACTERS = 400
"""The maximum number of characters of a document that the data card shows."""

# Control characters except tab and line feed, byte order marks, lone surrogates, and noncharacters of Unicode.
_REMOVED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def normalized(text: str, form: str) -> str:
    """Return the text in a Unicode normal form, with line feeds as line ends and without control characters."""
    text = _REMOVED.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text if form == "none" else unicodedata.normalize(form, text)  # type: ignore[arg-type]


@options
class Rules:
    """Rules that drop documents. A share is a fraction of the characters, from 0 to 1."""

    min_characters: int = option(default=50, at_least=0, help="The minimum number of characters in a document.")
    max_characters: int = option(default=1_000_000, at_least=1, help="The maximum number of characters in a document.")
    min_letters: float = option(
        default=0.5,
        at_least=0.0,
        at_most=1.0,
        help="The minimum share of letters, marks and digits among characters that are not white space.",
    )
    max_replaced: float = option(
        default=0.001,
        at_least=0.0,
        at_most=1.0,
        help="The maximum share of U+FFFD, the replacement of undecodable bytes.",
    )
    max_repeated_lines: float = option(
        default=0.3,
        at_least=0.0,
        at_most=1.0,
        help="The maximum share of characters in lines that occurred before in the document "
        '(Rae et al., "Scaling Language Models", 2021, table A1, use 0.2).',
    )
    max_line: int = option(default=10_000, at_least=1, help="The maximum mean length of a line, in characters.")

    def __post_init__(self) -> None:
        check_options(self, "clean.")

    def broken_by(self, text: str) -> str:
        """Return the name of the first rule that drops the text, or NO_RULE if there is none."""
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
        return NO_RULE


def _share_of_letters(text: str) -> float:
    letters = visible = 0
    for character, count in Counter(text).items():
        if not character.isspace():
            visible += count
            letters += count * (unicodedata.category(character)[0] in "LMN")
    return letters / visible if visible else 0.0


def _repeated(lines: list[str]) -> int:
    """Return the number of characters in repeated lines, except for lines of up to 3 characters, such as brackets."""
    counts = Counter(stripped for line in lines if len(stripped := line.strip()) > 3)
    return sum((count - 1) * len(line) for line, count in counts.items())


@dataclass(frozen=True)
class Judge:
    """Makes a document from a record, with `id`, `text`, `characters`, and the `rule` that drops it.

    id: a hash of the text (BLAKE2b, 16 bytes), so that equal documents have equal ids.
    """

    column: str
    form: str
    rules: Rules

    def __call__(self, record: Any) -> dict[str, Any]:
        """Return the document of a record. Raises DataError for a record without text."""
        text = record if isinstance(record, str) else record.get(self.column) if isinstance(record, dict) else None
        if not isinstance(text, str):
            known = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"the record has no text in column {self.column!r}", got=known)
        text = normalized(text, self.form)
        rule = self.rules.broken_by(text)
        return {
            "id": hashlib.blake2b(text.encode(), digest_size=16).digest(),
            "text": text if rule == NO_RULE else text[:EXAMPLE_CHARACTERS],
            "characters": len(text),
            "rule": rule,
        }


def passes_rules(document: dict[str, Any]) -> bool:
    """Return True if no rule drops the document."""
    return bool(document["rule"] == NO_RULE)


EXAMPLES = 3


def words_of(document: dict[str, Any]) -> list[str]:
    """Return the words of a document, as byte-level BPE splits text before merging.

    Raises ConfigError if the regex package isn't installed.
    """
    found: list[str] = _pattern().findall(document["text"])
    return found


@lru_cache(maxsize=1)
def _pattern() -> Any:
    try:
        return importlib.import_module("regex").compile(WORDS)
    except ImportError:
        raise ConfigError(
            "the regex package isn't installed",
            hint="pip install 'manyhands[text]', or remove vocabulary from [tokenizer], so that every byte is a token",
        ) from None


def some_examples() -> Aggregate:
    """Return an aggregate of the beginnings of the documents with the smallest ids, a pseudorandom, reproducible
    choice.
    """
    return Aggregate(start=_example, add=_one_more, merge=_both, finish=_texts)


def beginning(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with only the part of its text that an example shows."""
    return {**document, "text": document["text"][:EXAMPLE_CHARACTERS]}


def is_twice(group: dict[str, Any]) -> bool:
    """Return True if more than one document has the key."""
    return bool(group["documents"] > 1)


@dataclass(frozen=True)
class IsAmong:
    """A function that returns True for documents whose id is one of `ids`."""

    ids: frozenset[bytes]

    def __call__(self, document: dict[str, Any]) -> bool:
        return document["id"] in self.ids


def nothing(_: Any) -> int:
    """Return the same key for all records."""
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
