"""Tables and sources of a corpus recipe."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, field_validator, model_validator

from manyhands.config import nearest
from manyhands.corpus.duplicates import MinHash
from manyhands.corpus.text import FORMS, Rules
from manyhands.documents.recipe_file import IMPORT_PATH, find_function
from manyhands.documents.toml import Document, Table, read_document
from manyhands.errors import ConfigError, DataError
from manyhands.prepare.dataset import Dataset
from manyhands.prepare.io.listing import FORMATS, InputFile, find_files
from manyhands.prepare.plan.plan import PARTITION_BYTES, Given
from manyhands.storage.files import read_bytes

FILES = "files"  # the input format in which every file is a document


class InputTable(Table):
    """Where documents come from: paths, or a function that gives them (or a Dataset); and where their text is."""

    paths: list[str] = []
    path: str | None = Field(default=None, pattern=IMPORT_PATH)
    arguments: dict[str, JsonValue] = {}
    format: str | None = None
    text: str = "text"
    partition_bytes: int = Field(default=PARTITION_BYTES, ge=1)

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        return _one_of("input.format", value, (*FORMATS, FILES))

    @model_validator(mode="after")
    def _paths_or_path(self) -> InputTable:
        if bool(self.paths) == bool(self.path):
            raise ConfigError(
                "input.paths is missing" if not self.paths else "input.path is not for use beside paths",
                expected='paths = ["docs/*.jsonl"], or path = "module:function" of yours that returns them',
            )
        return self


class CleanTable(Table):
    """One form of Unicode, and the fields of `Rules`."""

    unicode: str = "NFC"
    min_characters: int = Field(default=Rules.min_characters, ge=0)
    max_characters: int = Field(default=Rules.max_characters, ge=1)
    min_letters: float = Field(default=Rules.min_letters, ge=0, le=1)
    max_replaced: float = Field(default=Rules.max_replaced, ge=0, le=1)
    max_repeated_lines: float = Field(default=Rules.max_repeated_lines, ge=0, le=1)
    max_line: int = Field(default=Rules.max_line, ge=1)

    @field_validator("unicode")
    @classmethod
    def _known_form(cls, value: str) -> str:
        return str(_one_of("clean.unicode", value, FORMS))

    def rules(self) -> Rules:
        """The rules themselves."""
        return Rules(**self.model_dump(exclude={"unicode"}))


class DuplicatesTable(Table):
    """Which duplicates are removed, and the fields of `MinHash`."""

    exact: bool = True
    near: bool = True
    bands: int = Field(default=MinHash.bands, ge=1, le=256)
    rows: int = Field(default=MinHash.rows, ge=1, le=64)
    shingle: int = Field(default=MinHash.shingle, ge=1, le=100)

    @model_validator(mode="after")
    def _exact_first(self) -> DuplicatesTable:
        if self.near and not self.exact:
            raise ConfigError(
                "duplicates.near wants exact, too", expected="exact = true, or near = false", got="exact = false"
            )
        return self

    def minhash(self) -> MinHash:
        """MinHash with these parameters."""
        return MinHash(bands=self.bands, rows=self.rows, shingle=self.shingle)


class TokenizerTable(Table):
    """A tokenizer.json; or how large a vocabulary to train, from which part of the documents; or neither: bytes."""

    file: str | None = None
    vocabulary: int | None = Field(default=None, ge=258, le=2**31)
    sample: float = Field(default=1.0, gt=0, le=1)
    end_of_text: str = "<|endoftext|>"
    fast: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> TokenizerTable:
        if self.file is not None and self.vocabulary is not None:
            raise ConfigError(
                "tokenizer.file is not for use beside vocabulary",
                expected="file = ..., or vocabulary = ... to train one",
            )
        return self


class CorpusSchema(Table):
    """A corpus recipe's tables, with defaults for what it leaves out."""

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    input: InputTable
    clean: CleanTable = CleanTable()
    duplicates: DuplicatesTable = DuplicatesTable()
    tokenizer: TokenizerTable = TokenizerTable()


def _one_of(field: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise ConfigError(
            f"{field} is not known", expected=", ".join(known), got=repr(value), hint=nearest(value, known)
        )
    return value


def read_corpus_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Document[CorpusSchema]:
    """Read and check a corpus recipe. Raises one ConfigError that tells all problems, each with file and line."""
    return read_document(path, overrides, CorpusSchema)


def located(document: Document[CorpusSchema], path: str, *key: str) -> str:
    """A path of the recipe: a relative one counts from its folder, or from the working one if `--set` gave it."""
    if "://" in path or document.origin(*key).startswith("--set"):
        return path
    return os.path.normpath(document.path.parent / path)


def source_of(document: Document[CorpusSchema]) -> Dataset:
    """The records that documents are made of. Raises ConfigError for a function that can't be used, DataError."""
    table = document.schema.input
    paths: Any = [located(document, path, "input", "paths") for path in table.paths]
    if table.path is not None:
        paths = _called(document, table)
        if isinstance(paths, Dataset):
            return paths
    try:
        if table.format != FILES:
            return Dataset.read(paths, format=table.format, partition_bytes=table.partition_bytes)
        return Dataset(Given(_parts(find_files(paths), table.partition_bytes), table.partition_bytes)).map(_whole_file)
    except (ConfigError, DataError) as error:
        key = "paths" if table.path is None else "path"
        error.where = f"{error.where or ''} ({document.origin('input', key)})".lstrip()
        raise


def _called(document: Document[CorpusSchema], table: InputTable) -> Any:
    """What the recipe's function returns. The recipe's folder is put first on sys.path, and stays there."""
    folder = document.path.absolute().parent
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        found = find_function(str(table.path), folder)(**table.arguments)
    except ConfigError as error:
        error.where = document.origin("input", "path")
        raise
    except Exception as error:  # whatever the user's function raises
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


def _parts(files: Sequence[InputFile], partition_bytes: int) -> tuple[tuple[InputFile, ...], ...]:
    """Files in runs of about so many bytes."""
    parts: list[tuple[InputFile, ...]] = []
    part: list[InputFile] = []
    size = 0
    for file in files:
        part.append(file)
        size += file.size_bytes
        if size >= partition_bytes:
            parts.append(tuple(part))
            part, size = [], 0
    return (*parts, tuple(part)) if part else tuple(parts)


def _whole_file(file: InputFile) -> str:
    """Its text; what isn't UTF-8 becomes U+FFFD, of which a rule allows little."""
    return read_bytes(file.path).decode("utf-8-sig", "replace")
