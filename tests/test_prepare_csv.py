"""CSV files: every row arrives as it is, or is an error or a counted bad record with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import manyhands as mh
from manyhands.prepare.io import csv_files, csv_rows
from manyhands.prepare.io.csv_rows import BlockReader, row_blocks
from manyhands.prepare.io.formats import read_split, split_files
from manyhands.prepare.io.listing import find_files
from manyhands.prepare.records.pipeline import BadRecords

Found = tuple[list[Any], list[tuple[int, str]]]


def read(path: Path, limit: int = 1000, **how: Any) -> Found:
    """The records of a file; the lines and reasons of its bad records."""
    made = mh.Dataset.read(path, **how)
    written = made.write(
        f"{path}-out", workers=0, progress=False, max_bad_records=limit, format="parquet", overwrite=True
    )
    records = mh.Dataset.read(written.path).take(1000, workers=0, progress=False) if written.records else []
    bad = []
    if written.bad_records:
        for line in Path(f"{path}-out/_bad_records.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert entry["where"].startswith(f"{path}, line ")
            bad.append((int(entry["where"].rpartition(" ")[2]), entry["what"]))
    assert (len(records), len(bad)) == (written.records, written.bad_records)
    return records, bad


def found(tmp_path: Path, data: bytes, **how: Any) -> Found:
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    return read(path, **how)


def error(tmp_path: Path, data: bytes, **how: Any) -> mh.ManyhandsError:
    """The error of a job, whatever the limit."""
    with pytest.raises(mh.ManyhandsError) as caught:
        found(tmp_path, data, **how)
    return caught.value


def test_rows_that_are_all_longer_than_the_header_are_bad_records(tmp_path: Path) -> None:
    many = "the row has 3 fields where 2 are expected"
    assert found(tmp_path, b"a,b\n1,2,3\n4,5,6\n") == ([], [(2, many), (3, many)])
    with pytest.raises(mh.DataError, match=many) as caught:
        mh.Dataset.read(tmp_path / "a.csv").count(workers=0)
    assert caught.value.where == f"{tmp_path / 'a.csv'}, line 2"


def test_bad_rows_have_the_number_of_their_line(tmp_path: Path) -> None:
    data = b'a,b\n"x\ny",1\n\nz,q\nw,3,4\n"5"6,7\nv,8\n\xff,9\n'
    records, bad = found(tmp_path, data, types={"b": "int64"})
    assert records == [{"a": "x\ny", "b": 1}, {"a": "v", "b": 8}]
    assert [line for line, _ in bad] == [5, 6, 7, 9]
    reasons = ["a field of 'b'", "the row has 3 fields", "text follows the closing quote", "the row is not UTF-8 text"]
    assert all(what.startswith(reason) for (_, what), reason in zip(bad, reasons, strict=True))


def test_a_quote_that_swallows_rows_is_an_error_with_its_line(tmp_path: Path) -> None:
    open_quote = error(tmp_path, b'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    assert open_quote.what == "a quote of a CSV file is not closed"
    assert open_quote.where == f"{tmp_path / 'a.csv'}, line 3"
    closed_later = error(tmp_path, b'a,b\n1,2\n3,"4\n5,6\n7,"8"\n9,9\n')
    assert closed_later.what == "text follows the closing quote of a CSV field that has several lines"
    assert closed_later.where == f"{tmp_path / 'a.csv'}, line 3 to 5"
    assert "is not closed" in error(tmp_path, b'a,b\n1,"x').what
    assert "a quote is not closed" in error(tmp_path, b'a,"b\n1,2\n').what


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 1000)
    refused = error(tmp_path, b'a,b\n1,2\n3,"4\n' + b"5,6\n" * 2000)
    assert (refused.what, refused.where) == ("a row of a CSV file is too long", f"{tmp_path / 'a.csv'}, line 3")


def test_lines_are_not_counted_from_the_start_for_each_row_with_a_wrong_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    row = b'1,"say \\"hi\\" now",2\n'
    counted: list[int] = []

    def count_lines(data: bytes, start: int = 0, end: int | None = None) -> int:
        counted.append((len(data) if end is None else end) - start)
        return original(data, start, end)

    original = csv_rows.count_lines
    monkeypatch.setattr(csv_rows, "count_lines", count_lines)
    data = row * 1000
    (block,) = row_blocks(data, BlockReader(io.BytesIO(), 2**20), 2, "file", final=True)
    assert block.wrong == tuple((start, start + len(row)) for start in range(0, len(data), len(row)))
    assert (block.lines, block.starts()[1].tolist()) == (1000, list(range(2, 1002)))
    assert sum(counted) <= 3 * len(data)


def test_a_quote_of_a_header_that_is_never_closed_is_an_error_before_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []

    def scan_row(data: bytes, start: int, *, final: bool) -> csv_rows.ScannedRow:
        searched.append(len(data))
        return csv_rows.scan_row(data, start, final=final)

    monkeypatch.setattr(csv_files, "scan_row", scan_row)
    monkeypatch.setattr(csv_files, "_HEADER_BYTES", 1000)
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 8000)
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,"b\n' + b"1,2\n" * 10_000)
    with pytest.raises(mh.DataError) as caught:
        split_files(find_files([str(path)]), None, 2**25)
    assert (caught.value.what, caught.value.where) == ("the header of a CSV file is too long", str(path))
    assert searched == [1000, 2000, 4000, 8000]
    searched.clear()
    for size in (2, 998, 999, 1000, 1001, 3000, 7990):  # of the names and the line end, around the pieces
        name = "c" * (size - 1)
        path.write_bytes(f"{name}\n1\n".encode())
        (split,), _ = split_files(find_files([str(path)]), None, 2**25)
        tables = [piece.chunk for piece in read_split(split, BadRecords(0), None, {})]
        assert [row for table in tables for row in table.to_pylist()] == [{name: "1"}]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"a,b,a\n", "it has two columns named 'a'"),
        (b"a,,\n", "it has two columns named ''"),
        (b"caf\xe9,b\n", "it is not UTF-8 text"),
        ("a,b\n".encode("utf-16"), "it is not UTF-8 text"),
        ("a,b\n".encode("utf-16-le"), "it contains NUL bytes"),
        (b"a;b\n", "the columns are not divided by commas"),
        (b"a\tb\n", "the columns are not divided by commas"),
        (b'"a"b,c\n', "a quote is not closed, or text follows it"),
    ],
)
def test_a_header_that_loses_a_column_or_its_name_is_refused(tmp_path: Path, header: bytes, what: str) -> None:
    refused = error(tmp_path, b"\n" + header + b"1,2,3\n" if header[:1] == b"a" else header + b"1,2,3\n")
    assert refused.what.startswith(f"the header of a CSV file can't be used: {what}")
    assert refused.where == f"{tmp_path / 'a.csv'}, line {2 if header[:1] == b'a' else 1}"


def test_an_empty_first_line_does_not_make_text_a_number(tmp_path: Path) -> None:
    for start in (b"\n", b"\r\n\r\n", b"\xef\xbb\xbf\n", b""):
        assert found(tmp_path, start + b"zip\n00123\n") == ([{"zip": "00123"}], [])


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"a,b\n1,2", [("1", "2")]),
        (b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3,4\r\n", [("1", "2"), ("3", "4")]),
        (b"a,b\r1,2\r3,4\r", [("1", "2"), ("3", "4")]),
        (b'a,b\n"1 ""q""",""""\n"",""\n', [('1 "q"', '"'), ("", "")]),
        (b'a,b\n"x\r\ny","x\ry"\n', [("x\r\ny", "x\ry")]),
        (b'a,b\n 1 ,x y\n5" pipe,2\nx,"y\nz"\n', [(" 1 ", "x y"), ('5" pipe', "2"), ("x", "y\nz")]),
        (b"a,b\n1,x\0y\nNULL,NA\n", [("1", "x\0y"), ("NULL", "NA")]),
        (b"a,b\n", []),
        (b"a,b", []),
        (b"\n\r\n", []),
        (b"", []),
    ],
)
def test_rows_that_are_right_arrive_as_they_are(tmp_path: Path, data: bytes, rows: list[tuple[str, str]]) -> None:
    expected = ([{"a": a, "b": b} for a, b in rows], [])
    assert found(tmp_path, data) == expected
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(data))
    assert read(tmp_path / "a.csv.gz") == expected


def test_an_empty_field_of_the_only_column_is_a_row_only_in_quotes(tmp_path: Path) -> None:
    assert found(tmp_path, b'a\n1\n\n""\n2') == ([{"a": "1"}, {"a": ""}, {"a": "2"}], [])
    assert found(tmp_path, b'"a;b"\n1;2\n') == ([{"a;b": "1;2"}], [])


def test_a_number_too_large_for_its_type_does_not_become_infinity(tmp_path: Path) -> None:
    records, bad = found(tmp_path, b"x\n1e400\n-inf\n\n2\n1e308\n", types={"x": "float64"})
    assert records == [{"x": -float("inf")}, {"x": 2.0}, {"x": 1e308}]
    assert bad == [(2, "a field of 'x' doesn't fit its type: a number is too large for double")]


def test_files_with_other_columns_are_refused_and_another_order_is_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_text("b,a\n4,3\n")
    (tmp_path / "0.csv").write_text("")
    made = mh.Dataset.read(f"{tmp_path}/*.csv").map_batches(lambda table: table)
    made.write(f"{tmp_path}/out", format="parquet", workers=0)
    both = mh.Dataset.read(f"{tmp_path}/out").take(9, workers=0)
    assert [list(row.items()) for row in both] == [[("a", "1"), ("b", "2")], [("a", "3"), ("b", "4")]]
    for header in ("a,c", "a", "a,b,c"):
        (tmp_path / "2.csv").write_text(f"{header}\n1,2\n")
        with pytest.raises(mh.DataError, match="a CSV file has different columns than the first one") as caught:
            mh.Dataset.read(f"{tmp_path}/*.csv")
        assert caught.value.where == str(tmp_path / "2.csv")


def test_columns_are_selected_from_csv_and_json_lines_too(tmp_path: Path) -> None:
    assert found(tmp_path, b"a,b,c\n1,2,3\n4,5\n", columns=["c", "a"]) == (
        [{"c": "3", "a": "1"}],
        [(3, "the row has 2 fields where 3 are expected")],
    )
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": 2}\n\n{"b": 3}\n[4]\n')
    assert read(path, columns=["a"]) == (
        [{"a": 1}, {"a": None}],
        [(4, "the line is not a JSON object, so it has no columns")],
    )
    with pytest.raises(mh.DataError, match="there is no column 'd'"):
        mh.Dataset.read(tmp_path / "a.csv", columns=["d"]).count(workers=0)
    (tmp_path / "a.txt").write_text("x\n")
    wrong: list[tuple[str, Any]] = [("a.txt", ["a"]), ("a.csv", "abc"), ("a.csv", []), ("a.csv", ["a", "a"])]
    for name, columns in wrong:
        with pytest.raises(mh.ConfigError, match="columns can't be selected"):
            mh.Dataset.read(tmp_path / name, columns=columns)
    with pytest.raises(mh.ConfigError, match="types apply to CSV files only"):
        mh.Dataset.read(path, types={"a": "int64"})
    with pytest.raises(mh.ConfigError, match="the type of column 'a' is unknown"):
        mh.Dataset.read(tmp_path / "a.csv", types={"a": "int65"})


def random_file(generator: random.Random) -> bytes:
    """A file of two columns whose fields have quotes, delimiters and line ends."""
    ends = generator.choice(["\n", "\r\n", "\r"])
    rows = [[generator.choice(["", "x", 'a"b', "é", "1,2", "p\nq", "p\r\nq", '"']) for _ in "ab"] for _ in range(60)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=ends)
    writer.writerow(["a", "b"])
    for row in rows:
        writer.writerow(row)
        if generator.random() < 0.1:  # an empty line, or a quote in a field without quotes, which csv never writes
            text.write(generator.choice(["", '5" pipe,x']) + ends)
    return text.getvalue().encode()


@pytest.mark.parametrize("seed", range(40))
def test_rows_and_lines_equal_those_of_pythons_csv_at_any_block_size(seed: int) -> None:
    data = random_file(random.Random(seed))
    reader = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
    expected, line = [], 1
    for row in reader:
        if row:
            expected.append((row, line))
        line = reader.line_num + 1
    for block_bytes in (64, 100, 1000, 10**6):
        blocks = BlockReader(io.BytesIO(data), block_bytes)
        first, final = blocks.read()
        rows: list[Any] = []
        for block in row_blocks(first, blocks, 1, "file", final=final):
            starts, lines = block.starts()
            ends = [*starts[1:].tolist(), len(block.data)]
            texts = [block.data[a:b].decode() for a, b in zip(starts.tolist(), ends, strict=True)]
            rows += [(next(csv.reader([text])), at) for text, at in zip(texts, lines.tolist(), strict=True)]
        assert rows == expected


def test_a_thousand_typed_columns_take_no_longer_than_five_times_the_text(tmp_path: Path) -> None:
    names = [f"c{index}" for index in range(1000)]
    row = ",".join(map(str, range(1000)))
    (tmp_path / "a.csv").write_text("\n".join([",".join(names), *[row] * 1000]))
    splits, _ = split_files(find_files([f"{tmp_path}/a.csv"]), None, 2**25)

    def seconds(types: dict[str, str]) -> float:
        started = time.process_time()
        tables = [piece.chunk for piece in read_split(splits[0], BadRecords(0), None, types)]
        assert sum(len(table) for table in tables) == 1000
        table = tables[-1]
        assert isinstance(table, pa.Table)
        assert table.column("c999")[0].as_py() == (999 if types else "999")
        return time.process_time() - started

    typed = dict.fromkeys(names, "int64")
    text, cast = min(seconds({}) for _ in range(3)), min(seconds(typed) for _ in range(3))
    assert cast < 5 * text


def test_a_file_of_rows_that_all_misfit_has_bad_records_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,x\n2,y\n")
    made = mh.Dataset.read(tmp_path / "a.csv", types={"b": "int64"})
    assert made.write(tmp_path / "out", workers=0, max_bad_records=2).bad_records == 2
