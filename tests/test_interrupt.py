"""Ctrl-C and SIGTERM: the run ends after its step with a checkpoint, and resumes from it to the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import manyhands as mh

RECIPE = str(Path(__file__).resolve().parent / "support" / "faulty.toml")
STEPS = 40


def command(run_dir: Path, *options: str) -> list[str]:
    arguments = ["train", RECIPE, "--steps", str(STEPS), "--run-dir", str(run_dir), *options]
    return [sys.executable, "-m", "manyhands.cli.main", *arguments]


def stopped(run_dir: Path, number: signal.Signals, *, when: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process group; once the file `when` exists, send a signal, as a terminal does."""
    process = subprocess.Popen(
        command(run_dir, "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "STEP_SECONDS": "0.1", "FAULT": ""},
        start_new_session=True,
    )
    while not when.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    started = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_run_prints_how_to_resume_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / number.name
    ended = stopped(folder, number, when=folder / "metrics.jsonl")
    assert ended.returncode == 130
    assert ended.stdout == ""
    found = re.search(rf"^stopped after step (\d+), as requested \({number.name}\)$", ended.stderr, re.MULTILINE)
    assert found, ended.stderr
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{int(found[1]):08d}"
    assert int(found[1]) < STEPS
    assert f"  where: its last checkpoint is {checkpoint}\n" in ended.stderr
    assert f"  what to do: to continue: manyhands train {RECIPE} --steps {STEPS}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == int(found[1])

    loaded = mh.load_recipe(RECIPE)
    undisturbed = mh.train(loaded.recipe, steps=STEPS, show=False).digest
    again = subprocess.run(
        command(folder, "--workers", "1", "--sharding", "ddp", "--json"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert again.returncode == 0, again.stderr
    assert "resuming from step " in again.stderr
    summary = json.loads(again.stdout.splitlines()[-1])
    assert (summary["digest"], summary["steps"]) == (undisturbed, STEPS)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_stopped_during_start_up_reports_that_there_is_no_checkpoint(
    tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    # Worker 1's log is created when its process starts, a second before the first step.
    ended = stopped(run_dir, number, when=run_dir / "logs" / "worker-1.log")
    assert ended.returncode == 130
    assert ended.stdout == ""
    assert re.fullmatch(
        rf"the run was stopped by {number.name}; its workers exited\n"
        r"  where: there is no checkpoint: no step was completed\n",
        ended.stderr,
    ), ended.stderr
    assert list((run_dir / "checkpoints").iterdir()) == []
