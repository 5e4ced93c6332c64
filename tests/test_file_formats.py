"""The table of file formats: one entry is all that a format takes."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.corpus.recipe import InputTable
from manyhands.prepare.io import formats
from manyhands.prepare.io.formats import FORMATS, FileFormat, Input, format_of, input_formats, output_formats
from manyhands.prepare.io.listing import Split, undivided
from manyhands.prepare.io.reading import opened
from manyhands.prepare.records.pipeline import BadRecords, SourcedChunk


def read_words(
    split: Split, bad: BadRecords, columns: tuple[str, ...] | None, types: Mapping[str, str]
) -> Iterator[SourcedChunk]:
    with opened(split) as file:
        yield SourcedChunk(file.read().decode().split(), lambda index: f"{split.path}, word {index + 1}")


WORDS = FileFormat(suffixes=(".words",), input=Input(split=undivided, read=read_words))


def test_the_formats_are_these() -> None:
    assert input_formats() == ["parquet", "arrays", "npz", "jsonl", "text", "csv", "zarr", "netcdf"]
    of_lines = [name + suffix for name in ("jsonl", "text") for suffix in ("", ".gz", ".zst")]
    assert output_formats() == ["parquet", "arrays", "npz", *of_lines, "zarr", "tokens"]
    suffixes = [suffix for each in FORMATS.values() for suffix in each.suffixes]
    assert len(suffixes) == len(set(suffixes))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl", ("jsonl", None)),
        ("a.JSONL.GZ", ("jsonl", "gzip")),
        ("a/b.txt.zst", ("text", "zstd")),
        ("a.pq", ("parquet", None)),
        ("s3://bucket/a.csv.zstd", ("csv", "zstd")),
    ],
)
def test_suffixes_determine_format_and_compression(path: str, expected: tuple[str, str | None]) -> None:
    assert format_of(path, None) == expected


@pytest.mark.parametrize("path", ["a.tokens", "a.chunks", "a.gz", "a"])
def test_a_suffix_of_no_input_format_is_refused(path: str) -> None:
    with pytest.raises(mh.ConfigError, match="the format of a file isn't known"):
        format_of(path, None)
    assert format_of(path, "text")[0] == "text"


def test_one_entry_adds_an_input_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mh.ConfigError, match="unknown input format"):
        mh.Dataset.read(str(tmp_path), format="words")
    monkeypatch.setitem(FORMATS, "words", WORDS)
    (tmp_path / "a.words").write_text("one two\nthree")
    (tmp_path / "b.words.gz").write_bytes(gzip.compress(b"four"))
    (tmp_path / "c.words").write_text("")
    assert sorted(mh.Dataset.read(str(tmp_path)).take(9, workers=0)) == ["four", "one", "three", "two"]
    assert "words" not in output_formats()
    assert InputTable(paths=["*"], format="words").format == "words"


def test_a_format_whose_package_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.words").write_text("one")
    entry = FileFormat(suffixes=WORDS.suffixes, input=WORDS.input, needs="not_there_at_all", extra="words")
    monkeypatch.setitem(formats.FORMATS, "words", entry)
    for given in (None, "words"):
        with pytest.raises(mh.ConfigError, match="the format 'words' needs a package") as caught:
            mh.Dataset.read(str(tmp_path / "a.words"), format=given)
        assert "manyhands[words]" in str(caught.value.hint)
