"""What `read`, `from_records` and `write` take: paths, globs, stores, servers, tables; an output that is an input."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh
from manyhands.prepare.plan import plan
from manyhands.storage import http_file
from manyhands.storage.location import file_system
from support.s3 import BUCKET, VARIABLES, running

ROWS = [{"id": number} for number in range(3000)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def read(*paths: Any, **how: Any) -> list[Any]:
    return mh.Dataset.read(list(paths), **how).take(10**6, workers=0, progress=False)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# Paths and tables


def test_paths_may_be_path_objects_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "x\n")
    assert mh.Dataset.read(tmp_path / "a.txt").take(9, workers=0) == ["x"]
    assert read(tmp_path, str(tmp_path / "a.txt"), f"file://{tmp_path}/a.txt") == ["x", "x", "x"]
    with pytest.raises(mh.ConfigError, match="there are no paths to read"):
        mh.Dataset.read([])
    for wrong in (pa.table({"a": [1]}), {"a": 1}, {"a.txt", "b.txt"}, b"a.txt", 3, [3], [None]):
        with pytest.raises(mh.ConfigError, match="read takes paths") as caught:
            mh.Dataset.read(wrong)  # type: ignore[arg-type]
        assert "from_records" in str(caught.value.hint)
    with pytest.raises(mh.ConfigError, match=r"pathlib\.Path removes one of its slashes"):
        mh.Dataset.read(Path("s3://bucket/a.txt"))


def test_the_records_of_a_table_are_its_rows() -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
    table = pa.Table.from_pylist(rows)
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches())
    for given in (table, table.to_batches()[0], reader, iter(rows)):
        assert mh.Dataset.from_records(given).take(9, workers=0) == rows
    assert mh.Dataset.from_records(pa.array([1, None])).take(9, workers=0) == [1, None]
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(mh.ConfigError, match="a table has two columns named 'a'"):
        mh.Dataset.from_records(twice)
    for wrong in ("abc", b"abc", {"a": 1}, 3, pa.schema([]), pa.int64()):
        with pytest.raises(mh.ConfigError, match="from_records takes a list of records"):
            mh.Dataset.from_records(wrong)  # type: ignore[arg-type]


def test_the_records_of_a_data_frame_are_its_rows() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"n": [1, 2], "f": [0.5, float("nan")], "s": ["x", None], "o": [1, "y"]})
    first, second = mh.Dataset.from_records(frame).take(9, workers=0)
    assert first == {"n": 1, "f": 0.5, "s": "x", "o": 1}
    assert (second["n"], second["f"] != second["f"], second["s"], second["o"]) == (2, True, None, "y")
    keyed = pandas.DataFrame({"k": ["a", "b"], "t": pandas.to_datetime(["2020-01-01", None])}).set_index("k")
    at = datetime(2020, 1, 1, tzinfo=UTC).replace(tzinfo=None)
    assert mh.Dataset.from_records(keyed).take(9, workers=0) == [{"k": "a", "t": at}, {"k": "b", "t": None}]
    with pytest.raises(mh.ConfigError, match="a table has two columns named 'a'"):
        mh.Dataset.from_records(pandas.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(mh.ConfigError, match="read takes paths"):
        mh.Dataset.read(frame)


def test_the_records_of_a_polars_frame_are_its_rows() -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"n": [1, None], "s": ["x", "y"]})
    assert mh.Dataset.from_records(frame).take(9, workers=0) == [{"n": 1, "s": "x"}, {"n": None, "s": "y"}]
    assert mh.Dataset.from_records(frame["n"]).take(9, workers=0) == [1, None]
    with pytest.raises(mh.ConfigError, match="from_records takes a list of records"):
        mh.Dataset.from_records(frame.lazy())


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(mh.DataError, match="a Parquet file has two columns named 'a'"):
        mh.Dataset.read(tmp_path / "a.parquet")


# Names and globs


def test_names_with_brackets_are_names_if_they_exist(tmp_path: Path) -> None:
    put(tmp_path / "run[1]" / "a[2].txt", "right\n")
    put(tmp_path / "run1" / "a[2].txt", "wrong\n")
    put(tmp_path / "run[1]" / "a2.txt", "other\n")
    assert read(tmp_path / "run[1]" / "a[2].txt") == ["right"]
    assert sorted(read(f"{tmp_path}/run[1]/*.txt")) == ["other", "right"]
    assert sorted(read(f"{tmp_path}/run[1]")) == ["other", "right"]
    assert read(f"{tmp_path}/run[[]1]/a2.txt") == ["other"]
    assert read(f"{tmp_path}/run[12]/*.txt") == ["wrong"]


def test_wildcards_do_not_match_what_tools_hide(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "x/b.txt",
        "_temporary/0/c.txt",
        "x/_delta_log/d.txt",
        ".hidden/e.txt",
        "x/_f.txt",
        "_x/g.txt",
    ):
        put(tmp_path / name, f"{name}\n")
    assert read(f"{tmp_path}/**/*.txt") == ["a.txt", "x/b.txt"]
    assert read(f"{tmp_path}/*/*.txt") == ["x/b.txt"]
    assert read(f"{tmp_path}/_temporary/**/*.txt") == ["_temporary/0/c.txt"]
    assert read(f"{tmp_path}/**/_delta_log/*.txt") == ["x/_delta_log/d.txt"]
    assert read(f"{tmp_path}/_*/*.txt") == ["_x/g.txt"]
    assert read(f"{tmp_path}/**/_*.txt") == ["x/_f.txt"]


def test_a_link_to_a_folder_above_does_not_repeat_files(tmp_path: Path) -> None:
    put(tmp_path / "in" / "x" / "a.txt", "x\n")
    os.symlink("..", tmp_path / "in" / "x" / "up")
    os.symlink("x", tmp_path / "in" / "same")
    assert read(f"{tmp_path}/in/**/*.txt") == ["x", "x"]  # as x/a.txt and as same/a.txt
    for missing in ("nowhere/*", "nowhere/**/*.txt", "in/x/a.txt/*", "*/nowhere/*"):
        with pytest.raises(mh.DataError, match="no file matches"):
            read(f"{tmp_path}/{missing}")
    os.symlink("missing.txt", tmp_path / "in" / "b.txt")
    with pytest.raises(mh.DataError, match="a link leads to no file"):
        read(tmp_path / "in")


# Stores


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that puts an object at s3://bucket/NAME/key, past fsspec. It has the folder's address as `root`."""
    import botocore.session
    import s3fs

    for name, value in (VARIABLES | {"AWS_ENDPOINT_URL": server}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()

    class Bucket:
        root = f"s3://{BUCKET}/{tmp_path.name}"

        def __init__(self) -> None:
            self._client = botocore.session.get_session().create_client("s3", endpoint_url=server)

        def put(self, key: str, data: bytes = b"") -> None:
            self._client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{key}", Body=data)

        def delete(self, key: str) -> None:
            self._client.delete_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{key}")

    return Bucket()


def test_new_and_grown_objects_are_seen_by_the_next_read(bucket: Any) -> None:
    bucket.put("in/a.txt", b"1\n")
    for address in (f"{bucket.root}/in", f"{bucket.root}/in/*.txt", f"{bucket.root}/**/*.txt"):
        bucket.put("in/a.txt", b"1\n")
        assert read(address) == ["1"]
        bucket.put("in/a.txt", b"1\n2\n")
        bucket.put("in/b.txt", b"3\n")
        assert read(address) == ["1", "2", "3"]
        bucket.delete("in/b.txt")
        assert read(address) == ["1", "2"]


def test_an_object_of_equal_size_that_was_replaced_is_another_input(bucket: Any) -> None:
    bucket.put("a.txt", b"1\n")
    before = mh.Dataset.read(f"{bucket.root}/a.txt").identity
    assert mh.Dataset.read(f"{bucket.root}/a.txt").identity == before
    bucket.put("a.txt", b"2\n")
    assert mh.Dataset.read(f"{bucket.root}/a.txt").identity != before


def test_folder_markers_and_hidden_objects_of_a_store_are_no_input(bucket: Any) -> None:
    bucket.put("in/")
    bucket.put("in/x/")
    bucket.put("in/x_$folder$")
    for key in ("in/a.txt", "in/x/b.txt", "in/_temporary/0/c.txt", "in/x/_delta_log/d.txt", "in/_SUCCESS"):
        bucket.put(key, key.encode() + b"\n")
    assert read(f"{bucket.root}/in", format="text") == ["in/a.txt"]
    assert read(f"{bucket.root}/in/", format="text") == ["in/a.txt"]
    assert read(f"{bucket.root}/in/*", format="text") == ["in/a.txt"]
    assert read(f"{bucket.root}/in/**", format="text") == ["in/a.txt", "in/x/b.txt"]
    assert read(f"{bucket.root}/in/**/*.txt") == ["in/a.txt", "in/x/b.txt"]
    assert read(f"{bucket.root}/in/_temporary/**/*.txt") == ["in/_temporary/0/c.txt"]
    with pytest.raises(mh.DataError, match="no file matches"):
        read(f"{bucket.root}/in/y/*.txt")


def test_objects_with_brackets_in_their_names_are_read(bucket: Any) -> None:
    bucket.put("run[1]/a[2].txt", b"right\n")
    bucket.put("run1/a[2].txt", b"wrong\n")
    assert read(f"{bucket.root}/run[1]/a[2].txt") == ["right"]
    assert read(f"{bucket.root}/run[1]/*.txt") == ["right"]
    assert read(f"{bucket.root}/run[1]") == ["right"]


# HTTP servers


class Server(BaseHTTPRequestHandler):
    """Serves FILES. `way` says how; `failures` is the number of requests that it refuses or cuts first."""

    files: dict[str, bytes]
    ways: set[str]
    failures: int
    requests: list[str]

    def do_HEAD(self) -> None:
        self.send_error(405)

    def do_GET(self) -> None:
        cls = type(self)
        name = self.path.rpartition("/")[2]
        cls.requests.append(self.headers.get("Range", "all"))
        if name not in cls.files:
            self.send_error(404)
            return
        data, status, ranged = cls.files[name], 200, None
        if self.headers.get("Range") and "no ranges" not in cls.ways:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            if int(first) >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            end = min(int(last) + 1, len(data))
            ranged, status = f"bytes {first}-{end - 1}/{len(data)}", 206
            data = data[int(first) : end]
        probe = ranged is not None and len(data) == 1
        cut = False
        if not probe and cls.failures:
            cls.failures -= 1
            if "503" in cls.ways:
                self.send_error(503)
                return
            cut = True
        self.send_response(status)
        self.send_header("ETag", f'"{hash(cls.files[name])}"')
        if ranged:
            self.send_header("Content-Range", ranged)
        if "no length" not in cls.ways:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes], *ways: str, failures: int = 0) -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"files": files, "ways": set(ways), "failures": failures, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler
        finally:
            server.shutdown()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_file, "_FIRST_PAUSE_SECONDS", 0.001)


@pytest.mark.parametrize("ways", [(), ("no ranges",), ("503",), ("503", "no ranges"), ("cut",), ("cut", "no ranges")])
def test_a_file_of_a_server_is_complete_whatever_the_server_can_do(
    ways: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_file, "_AHEAD_BYTES", 5000)
    files = {"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES), "empty.jsonl": b""}
    for name in files:
        with serving(files, *ways, failures=2 if len(ways) - ("no ranges" in ways) else 0) as (url, _):
            found = read(f"{url}/{name}", partition_bytes=8000)
        assert found == (ROWS if files[name] else [])


def test_a_parquet_file_of_a_server_without_ranges_is_read() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=500)
    with serving({"a.parquet": sink.getvalue().to_pybytes()}, "no ranges") as (url, _):
        assert read(f"{url}/a.parquet", partition_bytes=1) == ROWS


def test_a_server_that_cuts_every_answer_gives_an_error_and_no_short_data() -> None:
    for ways in ((), ("no ranges",)):
        with serving({"a.jsonl": LINES}, *ways) as (url, handler):
            made = mh.Dataset.read(f"{url}/a.jsonl")
            handler.failures = 10**6
            with pytest.raises(mh.DataError, match=r"a file can't be read: .*5 attempts failed"):
                made.count(workers=0, progress=False)
    unknown = pytest.raises(mh.DataError, match="the server does not send the file's length")
    with serving({"a.jsonl": LINES}, "no ranges", "no length") as (url, _), unknown:
        mh.Dataset.read(f"{url}/a.jsonl")


def test_a_file_of_a_server_that_changes_while_it_is_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_file, "_AHEAD_BYTES", 5000)
    with serving({"a.jsonl": LINES * 20}) as (url, handler):
        with http_file.open_http(*file_system(f"{url}/a.jsonl")) as file:
            assert file.read(6000) == LINES[:6000]
            handler.files = {"a.jsonl": LINES.replace(b"1", b"2") * 20}
            with pytest.raises(OSError, match="the file changed while it was being read"):
                file.read()
        before = mh.Dataset.read(f"{url}/a.jsonl").identity
        handler.files = {"a.jsonl": LINES * 20}
        assert mh.Dataset.read(f"{url}/a.jsonl").identity != before


def test_an_address_with_a_question_mark_is_no_glob_and_one_that_is_missing_is_an_error() -> None:
    with serving({"a.jsonl?x=1": b'{"id": 0}\n<a href="b.jsonl">b</a>\n'}) as (url, _):
        made = mh.Dataset.read(f"{url}/a.jsonl?x=1", format="text")
        assert made.count(workers=0, progress=False) == 2
        with pytest.raises(mh.DataError, match="no file matches"):
            mh.Dataset.read(f"{url}/b.jsonl")
    with pytest.raises(mh.DataError, match="the address can't be listed"):
        mh.Dataset.read(f"{url}/a.jsonl")


# An output that is an input


def outputs(tmp_path: Path) -> list[tuple[str, str]]:
    """Pairs of an input and an output folder in which the output would replace the input, or be read with it."""
    mh.Dataset.from_records([1, 2]).write(f"{tmp_path}/out", workers=0)
    put(tmp_path / "out" / "below" / "b.jsonl", "1\n")
    put(tmp_path / "in" / "a.jsonl", "1\n")
    os.symlink("out", tmp_path / "link")
    os.symlink("../out/part-00000.jsonl", tmp_path / "in" / "linked.jsonl")
    return [
        ("out", "out"),
        ("out/*.jsonl", "out"),
        ("link", "out"),
        ("out", "link"),
        ("in/*.jsonl", "out"),
        ("out/below", "out"),
        ("in", "in"),
        ("**/*.jsonl", "out"),
    ]


def test_a_job_whose_output_folder_holds_its_input_is_refused(tmp_path: Path) -> None:
    for source, target in outputs(tmp_path):
        for overwrite in (False, True):
            made = mh.Dataset.read(f"{tmp_path}/{source}").map(lambda x: x)
            with pytest.raises(mh.ConfigError, match="the output folder holds an input of the job"):
                made.write(f"{tmp_path}/{target}", workers=0, overwrite=overwrite)
    read_sorted = mh.Dataset.read(f"{tmp_path}/out").sort_by()
    with pytest.raises(mh.ConfigError, match="the output folder holds an input of the job"):
        read_sorted.join(read_sorted, on=lambda x: x).cache(f"{tmp_path}/out").count(workers=0)
    cached = mh.Dataset.from_records([1, 2]).cache(f"{tmp_path}/cache")
    with pytest.raises(mh.ConfigError, match="the output folder holds an input of the job"):
        cached.map(str).write(f"{tmp_path}/cache", workers=0, overwrite=True)
    assert read(tmp_path / "out" / "part-00000.jsonl") == [1, 2]


def test_an_output_folder_below_the_input_folder_is_no_input(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jsonl", "1\n")
    made = mh.Dataset.read(tmp_path / "in")
    for _ in range(2):
        assert made.write(f"{tmp_path}/in/out", workers=0).records == 1


def test_a_store_refuses_an_output_that_is_an_input(bucket: Any) -> None:
    bucket.put("in/a.jsonl", b"1\n")
    for target in ("in", "in/", ""):
        with pytest.raises(mh.ConfigError, match="the output folder holds an input of the job"):
            mh.Dataset.read(f"{bucket.root}/in/*.jsonl").write(f"{bucket.root}/{target}", workers=0)
    assert mh.Dataset.read(f"{bucket.root}/in").write(f"{bucket.root}/in2", workers=0).records == 1


def test_two_caches_of_a_job_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = mh.Dataset.from_records([1, 2, 3]).cache(f"{tmp_path}/cache")
    second = mh.Dataset.from_records([2, 3, 4]).cache(f"{tmp_path}/cache")
    with pytest.raises(mh.ConfigError, match="two caches of one job have the same folder"):
        first.join(second, on=lambda x: x).take(9, workers=0)
    assert first.join(first, on=lambda x: x).count(workers=0) == 3


# Many small files


def test_many_small_files_are_packed_and_no_byte_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(600):
        rows = [{"id": 3 * i + j, "user": f"u{(i * 7 + j) % 50}"} for j in range(3)]
        put(tmp_path / f"{i:03d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    made = mh.Dataset.read("*.jsonl")
    jobs: dict[str, mh.Dataset] = {
        "d4a4cdcb1f4675e03531": made.shuffle(seed=1),
        "8eda9fa193fca1ef09b5": made.group_by("user").aggregate(ids=mh.Aggregate.collect(of="id")),
    }  # the digests of a version that ran one task for each file
    for digest, job in jobs.items():
        stage = plan.make_plan(job._node, plan.Output("jsonl", None)).stages[0]
        assert (stage.partitions, stage.tasks) == (600, 300)
        for how in ({"workers": 0}, {"workers": 2, "memory": "384MiB"}):
            made_digest = job.write("out", progress=False, overwrite=True, **how).digest  # type: ignore[arg-type]
            assert made_digest.startswith(digest)
    assert (made.count(workers=0, progress=False), made.sample(0.5, seed=3).count(workers=2, progress=False)) == (
        1800,
        890,
    )
    assert made.take(4, workers=0) == [{"id": i, "user": f"u{[0, 1, 2, 7][i]}"} for i in range(4)]


def test_few_files_or_large_ones_are_not_packed() -> None:
    def tasks(count: int, size: int) -> int | None:
        split = plan.Split(path="a", format="text", compression=None, start=0, end=None, size_bytes=size)
        splits = (split,) * count
        source = plan.Read((), splits, None, {}, 1000)
        return plan.Stage(0, "", "", source, (), plan.Counting(), 1000).tasks

    assert [tasks(count, 1) for count in (0, 1, 511, 512, 10_000, 100_000)] == [0, 1, 511, 256, 257, 1563]
    assert [tasks(10_000, size) for size in (100, 501, 5000)] == [1000, 10_000, 10_000]


@pytest.mark.parametrize("change", ["append", "replace"])
def test_a_file_that_changes_after_it_was_listed_is_reported(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n":1}\n{"n":2}\n')
    made = mh.Dataset.read(path).map(lambda row: row["n"])
    if change == "append":
        path.write_text('{"n":1}\n{"n":2}\n{"n":3}\n')
    else:
        path.write_text('{"n":3}\n{"n":4}\n')
        os.utime(path, ns=(0, 0))
    with pytest.raises(mh.DataError, match="a file has changed since it was listed") as caught:
        made.write(tmp_path / "out", workers=0)
    assert caught.value.where == str(path)
    assert sorted(each.name for each in (tmp_path / "out").iterdir() if each.name[0] not in "._") == []


def test_folders_may_be_paths(tmp_path: Path) -> None:
    made = mh.Dataset.from_records([1, 2]).cache(tmp_path / "cache")
    assert made.write(tmp_path / "out", workers=0).records == 2
    assert mh.Dataset.read(tmp_path / "out").count(workers=0) == 2
