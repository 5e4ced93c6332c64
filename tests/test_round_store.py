"""The store of rounds: complete files only, whatever is killed, cut off, slow, foreign or written twice."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from manyhands.errors import ConfigError, DataError, Interrupted, InvariantError
from manyhands.rounds import outages
from manyhands.rounds.outages import seconds_worth_waiting
from manyhands.rounds.store import RoundStore
from manyhands.storage.location import Address, Location, StoreError, location_of
from support.processes import started
from support.rounds import FACTS, opened, s3_variables
from support.s3 import BUCKET, Network, free_port, running
from support.tracer import IS_SUPPORTED, MAY_NOT_TRACE, traced

HAS_S3 = all(map(importlib.util.find_spec, ("s3fs", "moto")))
needs_s3 = pytest.mark.skipif(not HAS_S3, reason="s3fs and moto[server] aren't installed")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def bucket(server: str, tmp_path: Path) -> Iterator[str]:
    """An address in S3 with nothing below it."""
    with s3_variables(server):
        yield f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"


SHARED = ["folder", pytest.param("s3", marks=needs_s3)]
"""Places that several processes can use. memory:// belongs to one process, and shows files that are being written."""


@pytest.fixture(params=[*SHARED, "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.parent.name}/{tmp_path.name}"


def result(tmp_path: Path, content: bytes = b"result", suffix: str = ".safetensors") -> Path:
    path = tmp_path / f"result{suffix}"
    path.write_bytes(content)
    return path


def read(store: RoundStore, round: int, island: int, to: Path) -> bytes:
    return store.fetch(round, island, to).read_bytes()


def write(location: Location, text: str) -> None:
    if isinstance(location, Path):
        location.parent.mkdir(parents=True, exist_ok=True)
    location.write_text(text)


def test_files_of_rounds_are_published_listed_read_and_pruned(place: str, tmp_path: Path) -> None:
    said: list[str] = []
    store = opened(place, said.append)
    assert store.rounds() == []
    assert store.present(3) == set()
    store.publish(3, 1, result(tmp_path, b"a" * 100))
    store.publish(3, 0, result(tmp_path, b"b" * 50, ".safetensors.zst"))
    store.publish(100_000_000, 3, result(tmp_path))
    store.publish(3, 1, result(tmp_path, b"other"))  # the first one stays
    assert (store.rounds(), store.present(3), store.bytes_up) == ([3, 100_000_000], {0, 1}, 156)
    assert read(store, 3, 1, tmp_path) == b"a" * 100
    assert store.fetch(3, 0, tmp_path) == tmp_path / "island-0.safetensors.zst"
    assert (tmp_path / "island-0.safetensors.zst").read_bytes() == b"b" * 50
    assert store.bytes_down == 150  # a folder counts like a store
    with pytest.raises(FileNotFoundError):
        read(store, 3, 2, tmp_path)
    store.prune(4)
    assert (store.rounds(), store.present(3)) == ([100_000_000], set())
    assert opened(place).present(100_000_000) == {3}
    assert str(store.state_root(2)).endswith("/states/island-2")
    with pytest.raises(InvariantError):
        store.publish(1, 1, result(tmp_path, suffix=".txt"))
    assert said == []


def test_a_place_of_another_recipe_or_of_something_else_is_refused(place: str) -> None:
    location = location_of(place)
    opened(place)
    opened(place)
    store = RoundStore(location, lambda text: None)
    with pytest.raises(ConfigError, match="belongs to another recipe") as caught:
        store.open("e" * 16, FACTS | {"seed": "2"}, 5)
    assert (caught.value.expected, caught.value.got) == ("seed: 2", "seed: 1")
    assert caught.value.hint is not None
    assert "also different: count, fingerprint" in caught.value.hint
    with pytest.raises(ConfigError, match="belongs to another recipe") as caught:
        store.open("e" * 16, FACTS, 4)
    assert caught.value.got == f"fingerprint: {'f' * 16}"

    record = json.loads((location / "islands.json").read_text())
    for damaged in ("", "{", "[1]", json.dumps(record | {"count": 5}), json.dumps({"format": "x"}), "[" * 100_000):
        (location / "islands.json").write_text(damaged)
        with pytest.raises(ConfigError, match="record is damaged"):
            opened(place)
    (location / "islands.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ConfigError, match="another format"):
        opened(place)
    (location / "islands.json").unlink()
    write(location / "notes.txt", "mine")
    with pytest.raises(ConfigError, match="holds something else") as caught:
        opened(place)
    assert caught.value.got == "notes.txt"


def test_names_that_are_not_ours_are_reported_once_and_stay(place: str, tmp_path: Path) -> None:
    said: list[str] = []
    store, location = opened(place, said.append), location_of(place)
    store.publish(1, 0, result(tmp_path))
    foreign = ["rounds/00000001/island-01.safetensors", "rounds/1/island-1.safetensors", "rounds/00000001/note\x1b.txt"]
    for name in foreign:
        write(location / name, "foreign")
    for _ in range(2):
        assert store.present(1) == {0}
        assert store.rounds() == [1]
    store.prune(2)
    assert store.rounds() == []
    assert len(said) == 3
    assert "rounds/00000001/note\\x1b.txt" in "".join(said)
    for name in foreign:
        assert (location / name).read_text() == "foreign"


def test_links_in_a_shared_folder_are_not_followed(tmp_path: Path) -> None:
    outside, said = tmp_path / "outside", list[str]()
    outside.mkdir()
    secret = outside / "island-0.safetensors"
    secret.write_text("secret")
    store = opened(tmp_path / "store", said.append)
    rounds = tmp_path / "store" / "rounds"
    (rounds / "00000001").mkdir(parents=True)
    (rounds / "00000001" / "island-0.safetensors").symlink_to(secret)
    os.mkfifo(rounds / "00000001" / "island-1.safetensors")
    (rounds / "00000002").symlink_to(outside)
    assert (store.present(1), store.present(2), store.rounds()) == (set(), set(), [])
    with pytest.raises(ConfigError, match="is a link"):
        store.publish(2, 1, result(tmp_path))
    store.prune(9)
    (rounds / "00000002").unlink()
    assert len(said) >= 3
    rounds.rename(tmp_path / "moved")
    rounds.symlink_to(outside)
    for use in (store.rounds, lambda: store.publish(1, 1, result(tmp_path)), lambda: store.prune(9)):
        with pytest.raises(ConfigError, match="is a link"):
            use()
    assert os.listdir(outside) == ["island-0.safetensors"]


@pytest.mark.parametrize("place", SHARED, indirect=True)
def test_concurrent_creators_and_publishers_leave_one_complete_file(place: str, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(300_000)
    path = result(tmp_path, content)

    def work(index: int) -> None:
        store = opened(place)
        for round in range(3):
            store.publish(round, 0, path)
            assert read(store, round, 0, tmp_path / str(index)) == content

    for index in range(4):
        (tmp_path / str(index)).mkdir()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    if "://" not in place:
        files = sorted(path.name for path in Path(place).rglob("*") if path.is_file())
        assert files == [*["island-0.safetensors"] * 3, "islands.json"]


@pytest.mark.skipif(not IS_SUPPORTED, reason="the tracer knows Linux on x86-64 and aarch64")
def test_a_kill_leaves_no_file_or_a_complete_file_and_the_next_writer_tidies_up(tmp_path: Path) -> None:
    path, number, tries = result(tmp_path, b"x" * 1000), 0, 0
    while True:
        number += 1
        place = tmp_path / f"store-{number}"
        try:
            trace = traced(lambda _: opened(place).publish(1, 0, path), number)  # noqa: B023
        except PermissionError:
            pytest.skip(MAY_NOT_TRACE)
        for found in place.rglob("island*.safetensors"):
            assert found.read_bytes() == b"x" * 1000
        opened(place).publish(1, 0, path)
        files = sorted(found.name for found in place.rglob("*") if found.is_file())
        assert files == ["island-0.safetensors", "islands.json"], number
        if not trace.was_killed:
            break
        tries += 1
    assert tries > 8


@needs_s3
def test_a_kill_in_the_middle_of_an_upload_leaves_no_object(server: str, bucket: str, tmp_path: Path) -> None:
    path = result(tmp_path, b"x" * (8 << 20))
    store = opened(bucket)
    with Network(server) as network, s3_variables(network.url):
        network.freeze(after_bytes=3 << 20)
        command = [sys.executable, "-W", "ignore", "-m", "support.rounds", "publish", bucket, "1", "0", str(path)]
        with started(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
            assert network.is_frozen.wait(120), process.poll()
            process.send_signal(signal.SIGKILL)
            process.wait()
    with s3_variables(server):
        assert store.present(1) == set()
        store.publish(1, 0, path)
        assert store.fetch(1, 0, tmp_path).read_bytes() == path.read_bytes()


@needs_s3
def test_a_large_file_is_sent_in_parts(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyhands.rounds.store._MOST_IN_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr("manyhands.storage.location._PART_BYTES", 5 << 20)  # S3's least
    path, store = result(tmp_path, random.Random(0).randbytes(11 << 20)), opened(bucket)
    store.publish(1, 0, path)
    assert store.fetch(1, 0, tmp_path).read_bytes() == path.read_bytes()
    file = Address(f"{bucket}/rounds/00000001/island-0.safetensors")
    assert file._system.info(file._inner)["ETag"].endswith('-2"')  # so many parts


class Talk:
    """Takes reports. Reports are complete at once, so a test can wait for one."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._new = threading.Condition()

    def __call__(self, text: str) -> None:
        with self._new:
            self.said.append(text)
            self._new.notify_all()

    def wait_for(self, text: str) -> None:
        with self._new:
            assert self._new.wait_for(lambda: any(text in line for line in self.said), 120), self.said


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report after a fraction of the usual time."""
    monkeypatch.setattr(outages, "_REPORT_SECONDS", 0.3)
    monkeypatch.setattr(outages, "_MOST_PAUSE_SECONDS", 0.4)


@needs_s3
def test_an_outage_and_a_slow_network_cost_only_time(
    server: str, bucket: str, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyhands.rounds.store.AHEAD_BYTES", 1 << 18)
    content, state, talk = random.Random(0).randbytes(1 << 20), random.getstate(), Talk()
    path = result(tmp_path, content)
    with ThreadPoolExecutor(2) as pool, Network(server) as network, s3_variables(network.url):
        store = opened(bucket, talk)
        network.cut()
        published, listed = pool.submit(store.publish, 1, 0, path), pool.submit(store.present, 0)
        talk.wait_for("fails to")
        assert not published.done()
        network.mended()
        published.result(120)
        assert listed.result(120) == set()
        talk.wait_for("the islands' store answers again after ")
        network.delay = 0.02
        network.freeze(after_bytes=1 << 19)  # the copy is cut in its middle
        fetched = pool.submit(store.fetch, 1, 0, tmp_path)
        assert network.is_frozen.wait(120)
        network.cut()
        network.thaw()
        network.mended()
        assert fetched.result(120).read_bytes() == content
        assert store.bytes_down == len(content)
    assert random.getstate() == state


@needs_s3
def test_a_request_that_hangs_is_reported_repeated_and_interrupted(
    server: str, bucket: str, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 3600}})  # s3fs itself would wait
    talk, stop = Talk(), threading.Event()
    with ThreadPoolExecutor(1) as pool, Network(server) as network, s3_variables(network.url):
        store = opened(bucket, talk)
        network.freeze()
        listed = pool.submit(store.present, 1)
        talk.wait_for("there is no answer yet")
        network.thaw_new()  # the connection that hangs never answers, but another one does
        assert listed.result(120) == set()
        talk.wait_for("answers again")

        network.freeze()
        stopping = RoundStore(location_of(bucket), talk, patience=200, stopped=stop.is_set)
        listed = pool.submit(stopping.present, 1)
        assert network.is_frozen.wait(120)
        stop.set()
        with pytest.raises(Interrupted, match="while it waited for the islands' store"):
            listed.result(120)


def test_patience_ends(tmp_path: Path, impatient: None) -> None:
    store = RoundStore(tmp_path / "store", lambda text: None, patience=0.5)
    store.open("f" * 16, FACTS, 4)
    (tmp_path / "store").rename(tmp_path / "away")  # as if a shared folder were not mounted any more
    (tmp_path / "store").mkdir()
    with pytest.raises(DataError, match="does not answer") as caught:
        store.publish(1, 0, result(tmp_path))
    assert caught.value.got is not None
    assert "islands.json" in caught.value.got
    assert os.listdir(tmp_path / "store") == []


@needs_s3
def test_errors_that_stay_are_raised_at_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for use in (
        lambda: opened("s3://nowhere/run"),
        lambda: RoundStore(location_of("s3://nowhere/run"), print).present(1),
        lambda: RoundStore(location_of("s3://nowhere/run"), print).publish(1, 0, result(tmp_path)),
    ):
        with pytest.raises(ConfigError, match="bucket does not exist") as caught:
            use()
        assert caught.value.hint == "create the bucket first, or correct the address"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(outages, "_DOUBTFUL_SECONDS", 0.1)
    with pytest.raises(ConfigError, match="credentials"):
        opened(bucket)


def answer(code: str, status: int) -> Exception:
    """An error of botocore, as s3fs translates it."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    fields = {"Error": {"Code": code, "Message": "text"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(fields, "GetObject"))  # type: ignore[no-any-return]


@needs_s3
@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AccessDenied", 403, 0), ("InvalidAccessKeyId", 403, 0), ("NoSuchBucket", 404, 0),
        ("PermanentRedirect", 301, 0),
        ("SignatureDoesNotMatch", 403, 0), ("MethodNotAllowed", 405, 0), ("InsufficientStorage", 507, 0),
        ("RequestTimeTooSkewed", 403, 60), ("ExpiredToken", 400, 60), ("AuthorizationHeaderMalformed", 400, 60),
        ("SlowDown", 503, None), ("InternalError", 500, None), ("RequestTimeout", 400, None), ("Unknown", 502, None),
        ("NoSuchUpload", 404, None), ("BadDigest", 400, None), ("TooManyRequests", 429, None),
    ],
)  # fmt: skip
def test_what_is_worth_waiting_for_in_s3(code: str, status: int, expected: float | None) -> None:
    error = StoreError("text", "hint")
    error.__cause__ = answer(code, status)
    assert seconds_worth_waiting(error) == (float("inf") if expected is None else expected)


def test_what_is_worth_waiting_for_on_disks_and_in_other_stores() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR):
        assert seconds_worth_waiting(OSError(number, "text")) == 0
    for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EBUSY, errno.ECONNRESET):
        assert seconds_worth_waiting(OSError(number, "text")) == float("inf")

    def of(cause: Exception, **fields: Any) -> float:
        error = StoreError("text", "hint")
        vars(cause).update(fields)
        error.__cause__ = cause
        return seconds_worth_waiting(error)

    assert of(OSError("Forbidden: bucket/x")) == of(Exception("gcsfs"), code=403) == 0
    assert of(Exception("azure"), status_code=503) == of(Exception("gcsfs"), code=429) == float("inf")
    assert of(ConnectionError("text")) == of(TimeoutError()) == of(EOFError()) == float("inf")
    assert of(ValueError("Bad Request: bucket/x")) == 60


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path / "store")
    (tmp_path / "store").chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="can't be used: Permission denied"):
            store.publish(1, 0, result(tmp_path))
    finally:
        (tmp_path / "store").chmod(0o700)


@needs_s3
def test_a_store_that_was_never_there_is_reported(tmp_path: Path, impatient: None) -> None:
    talk = Talk()
    with s3_variables(f"http://127.0.0.1:{free_port()}"):
        store = RoundStore(Address(f"s3://{BUCKET}/run"), talk, patience=1.0)
        with pytest.raises(DataError, match="does not answer"):
            store.open("f" * 16, FACTS, 4)
    assert any("fails to give islands.json" in line for line in talk.said)
