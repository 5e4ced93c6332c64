"""Stop signals (Ctrl-C, SIGTERM, SIGUSR1, ...): the run ends after its step, and resumes to the same bits."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import manyhands as mh
from manyhands.errors import Interrupted
from manyhands.surroundings import STOP_SIGNALS
from support.models import gpt_recipe
from support.processes import started
from test_faults import PATIENT

RECIPE = str(Path(__file__).resolve().parent / "support" / "faulty.toml")
STEPS = 40


def descendants(pid: int) -> list[int]:
    """Return the Python processes that `pid` has started, and those that they have started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = status.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        if int(fields.split()[1]) == pid:
            child = int(status.parent.name)
            found += [*([child] if "python" in name else []), *descendants(child)]
    return found


def command(run_dir: Path, *options: str) -> list[str]:
    arguments = ["train", RECIPE, "--steps", str(STEPS), "--run-dir", str(run_dir), *PATIENT, *options]
    return [sys.executable, "-m", "manyhands.cli.main", *arguments]


def stopped(
    run_dir: Path, number: signal.Signals, *, when: Path, options: tuple[str, ...] = (), fault: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command; once the file `when` exists, send a signal as a terminal or a scheduler does.

    SIGINT goes to the process group, SIGTERM to the command, and other signals to all processes of the job.
    """
    process = subprocess.Popen(
        command(run_dir, "--workers", "2", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "STEP_SECONDS": "0.1", "FAULT": fault, "FAULT_TIME": f"{run_dir}-fault"},
        start_new_session=True,
    )
    while not when.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    elif number == signal.SIGTERM:
        process.send_signal(number)
    else:
        for pid in [*descendants(process.pid), process.pid]:
            os.kill(pid, number)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


SIGNALS = [
    signal.SIGINT,
    *(
        pytest.param(number, marks=pytest.mark.slow)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
    ),
]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_run_prints_how_to_resume_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / number.name
    ended = stopped(folder, number, when=folder / "metrics.jsonl", options=("--loader-workers", "1"))
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
        timeout=240,
    )
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {found[1]} " in again.stderr
    summary = json.loads(again.stdout.splitlines()[-1])
    assert (summary["digest"], summary["steps"]) == (undisturbed, STEPS)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_stopped_during_start_up_reports_that_there_is_no_checkpoint(
    tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    # Worker 1's log is created when its process starts. It stalls while it imports the recipe, so there is no step.
    ended = stopped(run_dir, number, when=run_dir / "logs" / "worker-1.log", fault="stall start 0 1")
    assert ended.returncode == 130
    assert ended.stdout == ""
    assert re.fullmatch(
        r"starting 2 workers \.\.\.\n"
        rf"the run was stopped by {number.name}; its workers exited\n"
        r"  where: there is no checkpoint: no step was completed\n",
        ended.stderr,
    ), ended.stderr
    assert list((run_dir / "checkpoints").iterdir()) == []


@pytest.fixture
def unignored() -> Iterator[None]:
    """Handle the stop signals by default, also if this process was started with some of them ignored (nohup)."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("unignored")
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_script_is_stopped_by_any_stop_signal_to_it_and_its_loader_processes(
    tmp_path: Path, number: signal.Signals
) -> None:
    recipe, before = gpt_recipe(batch=mh.Batch(global_size=2, micro_size=2)), signal.getsignal(number)
    calls = itertools.count()

    def loss(model: Any, batch: Any) -> Any:
        if next(calls):
            return recipe.loss(model, batch)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, number)
        os.kill(os.getpid(), number)
        return recipe.loss(model, batch)

    with pytest.raises(Interrupted, match="stopped after step 2") as caught:
        mh.train(
            gpt_recipe(batch=recipe.batch, loss=loss),
            steps=9,
            run_dir=tmp_path,
            strategy=mh.Strategy(loader_workers=1),
            show=False,
        )
    assert "step-00000002" in str(caught.value.where)
    assert signal.getsignal(number) == before


def test_a_background_job_of_a_script_ignores_ctrl_c_and_follows_sigterm(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command(run_dir, "--workers", "1")]
    with started(ignoring, start_new_session=True) as process:
        while not (run_dir / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        for pid in [*descendants(process.pid), process.pid]:
            os.kill(pid, signal.SIGINT)
        steps = len((run_dir / "metrics.jsonl").read_text().splitlines())
        while len((run_dir / "metrics.jsonl").read_text().splitlines()) < steps + 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.terminate()
        _, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "as requested (SIGTERM)" in said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP], ids=lambda number: number.name)
def test_a_script_keeps_its_own_handler(number: signal.Signals) -> None:
    recipe, received = gpt_recipe(batch=mh.Batch(global_size=2, micro_size=2)), []

    def loss(model: Any, batch: Any) -> Any:
        os.kill(os.getpid(), number)
        return recipe.loss(model, batch)

    before = signal.signal(number, lambda *_: received.append(number))
    try:
        mh.train(gpt_recipe(batch=recipe.batch, loss=loss), steps=2, show=False)
    finally:
        signal.signal(number, before)
    assert received == [number] * 2
