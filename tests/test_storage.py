"""Atomic writes: SIGKILL at any system call leaves the old or the new content; the next run clears the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.storage.atomic import (
    is_temporary,
    open_atomic,
    publish_folder,
    remove_temporary_files,
    write_atomic,
)
from manyhands.storage.files import exists, move, names_in, read_bytes, remove
from manyhands.storage.run_lock import FileLock, run_lock
from support.tracer import IS_SUPPORTED, MAY_NOT_TRACE, traced

traces = pytest.mark.skipif(not IS_SUPPORTED, reason="the tracer knows Linux on x86-64 and aarch64")


def calls_of(work: Callable[[], None]) -> list[str]:
    try:
        return traced(lambda _: work()).calls
    except PermissionError:
        pytest.skip(MAY_NOT_TRACE)


def killed_at_each_call(prepare: Callable[[], None], work: Callable[[], None], check: Callable[[bool], None]) -> None:
    number = 0
    while True:
        number += 1
        prepare()
        try:
            trace = traced(lambda _: work(), number)
        except PermissionError:
            pytest.skip(MAY_NOT_TRACE)
        check(not trace.was_killed)
        if not trace.was_killed:
            return


@traces
def test_a_file_is_written_synced_renamed_and_its_folder_synced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    calls = [call for call in calls_of(lambda: write_atomic(path, b"new")) if call not in ("open", "openat")]
    assert calls[:4] == ["write", "fsync", "rename", "fsync"]
    calls = [c for c in calls_of(lambda: write_atomic(path, b"x", first_wins=True)) if c not in ("open", "openat")]
    assert calls[:4] == ["write", "fsync", "link", "fsync"]
    assert path.read_bytes() == b"new"
    assert "fsync" not in calls_of(lambda: write_atomic(path, b"unsynced", durable=False))
    assert path.read_bytes() == b"unsynced"


@traces
@pytest.mark.parametrize("first_wins", [False, True])
def test_a_kill_leaves_the_old_or_the_new_content(tmp_path: Path, first_wins: bool) -> None:
    path = tmp_path / "run" / "file"

    def prepare() -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"old")

    def check(complete: bool) -> None:
        expected = {b"old"} if first_wins else {b"new"} if complete else {b"old", b"new"}
        assert path.read_bytes() in expected
        assert all(is_temporary(name) for name in os.listdir(path.parent) if name not in ("file", ".lock"))
        with run_lock(path.parent):
            assert sorted(os.listdir(path.parent)) == [".lock", "file"]

    killed_at_each_call(prepare, lambda: write_atomic(path, b"new", first_wins=first_wins), check)


@traces
def test_a_folder_is_published_atomically(tmp_path: Path) -> None:
    partial, final = tmp_path / ".final.partial", tmp_path / "final"

    def prepare() -> None:
        remove(partial)
        remove(final)
        for folder, text in ((partial, "new"), (final, "old")):
            folder.mkdir()
            (folder / "data").write_text(text)
        (final / "manifest").write_text("old")

    def check(complete: bool) -> None:
        found = (final / "data").read_text(), (final / "manifest").read_text()
        assert found in ([("new", "new")] if complete else [("new", "new"), ("old", "old")])

    killed_at_each_call(prepare, lambda: publish_folder(partial, final, ("manifest", "new"), replace=True), check)
    assert not partial.exists()


def test_a_file_does_not_appear_if_writing_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_atomic(tmp_path / "file") as file:
        file.write(b"half" * (1 // 0))
    with open_atomic(tmp_path / "file"):
        pass  # nothing is written
    assert os.listdir(tmp_path) == []


def test_other_hidden_files_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / ".mine.tmp").touch()
    (tmp_path / ".a.json.12-0123456789ab.tmp").touch()
    remove_temporary_files(tmp_path)
    assert os.listdir(tmp_path) == [".mine.tmp"]


@pytest.mark.parametrize("root", ["disk", "memory://manyhands-storage", "file"])
def test_paths_and_addresses_have_the_same_interface(tmp_path: Path, root: str) -> None:
    folder = {"disk": str(tmp_path), "file": f"file://{tmp_path}"}.get(root, root)
    remove(f"{folder}/b")
    assert names_in(f"{folder}/missing") == []
    write_atomic(f"{folder}/a", b"one")
    write_atomic(f"{folder}/a", "two")
    with open_atomic(f"{folder}/c") as file:
        file.write(b"three")
    move(f"{folder}/a", f"{folder}/b")
    assert names_in(folder) == ["b", "c"]
    assert [exists(f"{folder}/{name}") for name in "abc"] == [False, True, True]
    assert read_bytes(f"{folder}/b") == b"two"
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{folder}/a")
    for name in "bc":
        remove(f"{folder}/{name}")
    remove(f"{folder}/c")
    assert names_in(folder) == []


def test_a_lock_can_be_shared(tmp_path: Path) -> None:
    first, second, third = (FileLock(tmp_path / "lock") for _ in range(3))
    assert first.take()
    first.write("clearing")
    assert second.read() == "clearing"
    assert not second.take(shared=True, patience_seconds=0.1)
    assert first.take(shared=True)
    assert second.take(shared=True)
    assert not third.take()
    first.close()
    second.close()
    assert third.take()
    third.close()
