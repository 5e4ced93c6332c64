"""The tables and sources of a corpus recipe."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, field_validator, model_validator

from manyhands.corpus.duplicates import MinHash
from manyhands.corpus.text import FORMS, Rules
from manyhands.documents.functions import IMPORT_PATH, find_function
from manyhands.documents.option_table import BuildableTable
from manyhands.documents.toml import Document, Table, read_document
from manyhands.errors import ConfigError, DataError
from manyhands.options import nearest
from manyhands.prepare.dataset import Dataset
from manyhands.prepare.io.formats import input_formats
from manyhands.prepare.io.listing import InputFile, find_files
from manyhands.prepare.plan.plan import PARTITION_BYTES, InMemory
from manyhands.prepare.records.copies import pack_records
from manyhands.storage.files import read_bytes

FILES = "files"  # the input format in which each file is one document


class InputTable(Table):
    """The source of documents (paths, or a function that returns paths or a Dataset), and the column with the text."""

    paths: list[str] = []
    path: str | None = Field(default=None, pattern=IMPORT_PATH)
    arguments: dict[str, JsonValue] = {}
    format: str | None = None
    text: str = "text"
    partition_bytes: int = Field(default=PARTITION_BYTES, ge=1)

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        return _one_of("input.format", value, (*input_formats(), FILES))

    @model_validator(mode="after")
    def _paths_or_path(self) -> InputTable:
        if bool(self.paths) == bool(self.path):
            raise ConfigError(
                "input.paths is missing" if not self.paths else "input.path can't be used together with paths",
                expected='paths = ["docs/*.jsonl"], or path = "module:function" that returns paths',
            )
        return self


class CleanTable(BuildableTable[Rules]):
    """The Unicode normal form, and the options of `Rules`."""

    prefix = "clean."

    unicode: str = "NFC"

    @field_validator("unicode")
    @classmethod
    def _known_form(cls, value: str) -> str:
        return str(_one_of("clean.unicode", value, FORMS))


class DuplicatesTable(BuildableTable[MinHash]):
    """The kinds of duplicates that are removed, and the options of `MinHash`."""

    prefix = "duplicates."

    exact: bool = True
    near: bool = True

    @model_validator(mode="after")
    def _exact_first(self) -> DuplicatesTable:
        if self.near and not self.exact:
            raise ConfigError(
                "duplicates.near requires exact", expected="exact = true, or near = false", got="exact = false"
            )
        return self


class TokenizerTable(Table):
    """A tokenizer.json, or the size of a vocabulary to train on a sample of the documents.

    By default, bytes are tokens.
    """

    file: str | None = None
    vocabulary: int | None = Field(default=None, ge=258, le=2**31)
    sample: float = Field(default=1.0, gt=0, le=1)
    end_of_text: str = "<|endoftext|>"
    fast: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> TokenizerTable:
        if self.file is not None and self.vocabulary is not None:
            raise ConfigError(
                "tokenizer.file can't be used together with vocabulary",
                expected="file = ..., or vocabulary = ... to train a tokenizer",
            )
        return self


class HeldOutTable(Table):
    """The share or the number of documents that are held out. By default, none are."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    documents: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> HeldOutTable:
        if self.fraction is not None and self.documents is not None:
            raise ConfigError(
                "validation.fraction can't be used together with documents",
                expected="fraction = 0.01, or documents = 1000",
            )
        return self


class CorpusSchema(Table):
    """The tables of a corpus recipe, with defaults."""

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    input: InputTable
    clean: CleanTable = CleanTable()
    duplicates: DuplicatesTable = DuplicatesTable()
    tokenizer: TokenizerTable = TokenizerTable()
    validation: HeldOutTable = HeldOutTable()

    def settings(self) -> dict[str, Any]:
        """Return the values that decide the corpus. A table [validation] that holds out no documents is omitted."""
        fields = self.model_dump()
        if not any(fields["validation"].values()):
            del fields["validation"]
        return fields


def _one_of(field: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise ConfigError(
            f"{field} has an unknown value", expected=", ".join(known), got=repr(value), hint=nearest(value, known)
        )
    return value


def read_corpus_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Document[CorpusSchema]:
    """Read and validate a corpus recipe. Raises one ConfigError that lists all problems, each with file and line."""
    return read_document(path, overrides, CorpusSchema)


def located(document: Document[CorpusSchema], path: str, *key: str) -> str:
    """Resolve a path of the recipe, relative to the recipe's folder, or to the working directory if `--set` set the
    path.
    """
    if "://" in path or document.origin(*key).startswith("--set"):
        return path
    return os.path.normpath(document.path.parent / path)


def source_of(document: Document[CorpusSchema]) -> Dataset:
    """Return the records of the input.

    Raises ConfigError for an invalid function, DataError for missing or invalid files.
    """
    table = document.schema.input
    paths: Any = [located(document, path, "input", "paths") for path in table.paths]
    if table.path is not None:
        paths = _call_function(document, table)
        if isinstance(paths, Dataset):
            return paths
    try:
        if table.format != FILES:
            return Dataset.read(paths, format=table.format, partition_bytes=table.partition_bytes)
        parts = tuple(map(pack_records, _parts(find_files(paths), table.partition_bytes)))
        return Dataset(InMemory(parts, table.partition_bytes)).map(_read_document_file)
    except (ConfigError, DataError) as error:
        key = "paths" if table.path is None else "path"
        error.where = f"{error.where or ''} ({document.origin('input', key)})".lstrip()
        raise


def _call_function(document: Document[CorpusSchema], table: InputTable) -> Any:
    """Call the recipe's function. Inserts the recipe's folder at the front of sys.path, where it stays."""
    folder = document.path.absolute().parent
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        found = find_function(str(table.path), folder)(**table.arguments)
    except ConfigError as error:
        error.where = document.origin("input", "path")
        raise
    except Exception as error:  # the user's function may raise anything
        raise ConfigError(
            f"{table.path} raised {type(error).__name__}: {error}", where=document.origin("input", "path")
        ) from error
    if isinstance(found, Dataset):
        return found
    if not found or not isinstance(found, list) or not all(isinstance(path, (str, Path)) for path in found):
        raise ConfigError(
            f"{table.path} returned neither paths nor a Dataset",
            where=document.origin("input", "path"),
            expected="a list of paths, or a manyhands.Dataset",
            got=repr(found)[:200],
        )
    return [str(path) for path in found]


def _parts(files: Sequence[InputFile], partition_bytes: int) -> list[list[InputFile]]:
    """Group files into runs of about `partition_bytes`."""
    parts: list[list[InputFile]] = []
    part: list[InputFile] = []
    size = 0
    for file in files:
        part.append(file)
        size += file.size_bytes
        if size >= partition_bytes:
            parts.append(part)
            part, size = [], 0
    return [*parts, part] if part else parts


def _read_document_file(file: InputFile) -> str:
    """Return the text of a file. Invalid UTF-8 becomes U+FFFD. The rule max_replaced limits its share."""
    return read_bytes(file.path).decode("utf-8-sig", "replace")
