"""Output is never a reason to stop: no reader, no stream, or an encoding that lacks characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyhands.listeners.run_directory import RunDirectory
from manyhands.output import SafeStream, console
from test_faults import MANYHANDS, PATIENT, SUPPORT

TRAIN = [*MANYHANDS, "train", str(SUPPORT / "faulty.toml"), *PATIENT, "--run-dir"]


def run_without_reader(command: list[str], **environment: str) -> int:
    """Run a command whose output goes to a pipe that nobody reads. Return its exit code."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        variables = {**os.environ, **environment}
        return subprocess.run(command, stdout=writer, stderr=writer, env=variables, check=False, timeout=240).returncode
    finally:
        os.close(writer)


def outcome(folder: Path) -> tuple[int, str]:
    run = RunDirectory.open_existing(folder)
    return len(run.read_metrics()), run.read_events()[-1]["digest"]


def test_commands_without_a_reader_or_with_closed_streams_do_their_work(tmp_path: Path) -> None:
    piped, closed = tmp_path / "piped", tmp_path / "closed"
    assert run_without_reader([*TRAIN, str(piped), "--workers", "2"], CHATTY="1") == 0
    script = '"$@" <&- >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *TRAIN, str(closed), "--workers", "1"],
        env={**os.environ, "CHATTY": "1"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0
    assert outcome(piped) == outcome(closed)
    assert outcome(piped)[0] == 5
    assert (piped / "logs" / "worker-1.log").read_text().count("loss") == 10
    assert run_without_reader([*MANYHANDS, "compare", str(piped), str(closed)]) == 0
    assert run_without_reader([*MANYHANDS, "doctor", str(piped)]) == 0
    assert run_without_reader([*MANYHANDS, "export", str(piped), str(tmp_path / "weights")]) == 0
    assert list((tmp_path / "weights").glob("*.safetensors"))


@pytest.mark.slow
def test_an_encoding_that_lacks_characters_simplifies_them(tmp_path: Path) -> None:
    environment = {**os.environ, "CHATTY": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*TRAIN, str(tmp_path / "run"), "--workers", "2"],
        env=environment,
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode("ascii")
    assert "loss 1 ->" in done.stdout.decode("ascii")
    assert outcome(tmp_path / "run")[0] == 5
    shown = subprocess.run([*MANYHANDS, "doctor", "--run-dir", str(tmp_path)], env=environment, capture_output=True)
    assert shown.returncode in (0, 1)
    assert b"Traceback" not in shown.stderr
    assert "shared memory" in shown.stdout.decode("ascii")


JOB = """
import sys
import manyhands as mh
def chatty(number):
    print(f"number {number} \N{RIGHTWARDS ARROW}", flush=True)
    return {"number": number}
if __name__ == "__main__":
    made = mh.Dataset.from_records(range(50)).map(chatty).write(sys.argv[1], format="jsonl", workers=1)
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_function_that_prints_to_nobody_makes_no_record_bad(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "job.py").write_text(JOB)
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "out")]
    assert run_without_reader(command, PYTHONIOENCODING=encoding) == 0
    lines = [json.loads(line) for file in (tmp_path / "out").glob("part-*") for line in file.read_text().splitlines()]
    assert len(lines) == 50


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import manyhands as mh
from support.models import gpt_recipe
mh.train(gpt_recipe(), steps=2)
"""


def test_a_script_that_trains_without_a_reader_ends_with_code_0() -> None:
    assert run_without_reader([sys.executable, "-c", SCRIPT, str(SUPPORT.parent)]) == 0


def test_a_safe_stream_never_raises() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        safe = SafeStream(lambda stream=stream: stream)  # type: ignore[misc]
        assert safe.write("text") == 4
        safe.flush()
        assert not safe.isatty()
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    safe = SafeStream(lambda: latin)
    safe.write("ä → 漢\udcff")
    safe.flush()
    assert latin.buffer.getvalue() == "ä -> ??".encode("latin-1")  # type: ignore[attr-defined]


def test_a_console_follows_the_stream_that_the_program_has_now(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("to standard error →")
    console(stderr=False).print("to standard output")
    assert capsys.readouterr() == ("to standard output\n", "to standard error →\n")
