"""Workers stay for the next job of a program, unless their environment or modules have changed."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.prepare.engines.local import close_persistent_pools


@pytest.fixture(autouse=True)
def no_pools() -> Iterator[None]:
    close_persistent_pools()
    yield
    close_persistent_pools()


def pids(folder: Path) -> set[int]:
    made = mh.Dataset.from_records(range(3)).map(lambda _: __import__("os").getpid())
    written = made.write(str(folder), workers=1, progress=False)
    return {int(line) for name in written.files for line in (folder / name).read_text().split()}


def test_the_next_job_has_the_same_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pids(tmp_path / "1")
    assert pids(tmp_path / "2") == first
    monkeypatch.setenv("SOMETHING", "else")
    third = pids(tmp_path / "3")
    assert not third & first
    monkeypatch.chdir(tmp_path)
    assert not pids(tmp_path / "4") & third


def test_a_changed_module_is_imported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "changing_module.py"

    def imported_value(_: int) -> int:
        import changing_module

        return int(changing_module.VALUE)

    made = mh.Dataset.from_records([0]).map(imported_value)
    found = []
    for value in (1, 22):
        module.write_text(f"VALUE = {value}\n")
        folder = tmp_path / str(value)
        made.write(str(folder), workers=1, progress=False)
        found.append((folder / "part-00000.jsonl").read_text().strip())
    assert found == ["1", "22"]
    assert "changing_module" not in sys.modules


def test_after_an_error_the_next_job_works(tmp_path: Path) -> None:
    slow = mh.Dataset.from_records(range(50), partition_bytes=1).map(lambda x: __import__("time").sleep(0.1) or 1 / x)
    with pytest.raises(mh.DataError, match="ZeroDivisionError"):
        slow.write(str(tmp_path / "bad"), workers=2, progress=False)
    assert mh.Dataset.from_records([1, 2]).map(lambda x: x + 1).count(workers=2, progress=False) == 2


def test_on_a_terminal_a_job_ends_with_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    written = mh.Dataset.from_records([1, 2]).write(str(tmp_path / "out"), workers=0, memory="1GiB")
    assert terminal.getvalue().endswith(f"{written}\n")
    assert "2 records in 1 file" in str(written)
    shown = len(terminal.getvalue())
    mh.Dataset.from_records([1]).write(str(tmp_path / "quiet"), workers=0, progress=False)
    assert len(terminal.getvalue()) == shown
