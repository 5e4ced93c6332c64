"""A run whose checkpoints are gone is refused, and starts over only on request, with the old record moved aside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints
from manyhands.doctor.runs import run_history
from manyhands.errors import ConfigError
from manyhands.listeners.run_directory import RunDirectory
from manyhands.surroundings import LAUNCH_VARIABLE, RESTARTS_VARIABLE
from support.models import gpt_recipe
from test_faults import MANYHANDS, PATIENT, SUPPORT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--master-port", "0"]


def train(run_dir: Path, checkpoint_dir: Path | None = None, *, steps: int = 2, **more: Any) -> mh.Summary:
    recipe = gpt_recipe(batch=mh.Batch(global_size=2, micro_size=2))
    return mh.train(recipe, steps=steps, run_dir=run_dir, checkpoint_dir=checkpoint_dir, show=False, **more)


def record_of(run_dir: Path) -> dict[str, bytes]:
    """The files of a run's record by name. An error may append to the log, and resuming rewrites nothing else."""
    names = ("metrics.jsonl", "events.jsonl", "recipe.json", "manifest.json", "digests/tensors.json")
    return {name: (run_dir / name).read_bytes() for name in names}


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


def refused(run_dir: Path, checkpoint_dir: Path | None = None) -> None:
    before = record_of(run_dir)
    with pytest.raises(ConfigError, match="the run's checkpoints are gone") as caught:
        train(run_dir, checkpoint_dir, steps=4)
    assert "step 2" in str(caught.value.expected)
    assert record_of(run_dir) == before


def test_a_run_whose_checkpoints_were_moved_away_is_refused_and_starts_over_on_request(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    first = train(run)
    (run / "checkpoints").rename(moved)
    refused(run)
    refused(run, tmp_path / "empty")
    before = record_of(run)
    again = train(run, start_over=True)
    assert again.digest == first.digest
    assert record_of(run / "earlier-1") == before
    assert (run / "earlier-1" / "logs" / "worker-0.log").exists()
    assert list((run / "earlier-1" / "digests").glob("step-*.npy"))
    assert [metrics.step for metrics in RunDirectory(run).read_metrics()] == [1, 2]
    lines = [text for _, text in run_history(RunDirectory(run)).lines]
    assert "started over: the record before is in earlier-1" in lines
    ids = [json.loads((folder / "manifest.json").read_bytes())["id"] for folder in (run, run / "earlier-1")]
    assert ids[0] == ids[1]

    train(run, start_over=True, steps=1)  # the checkpoints are there now: they move, too
    assert steps_in(run / "checkpoints") == [1]
    assert steps_in(run / "earlier-2" / "checkpoints") == [2]
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(moved, run / "checkpoints")
    assert train(run, steps=3).digest == train(tmp_path / "plain", steps=3).digest


def test_external_and_linked_checkpoints_that_are_gone_are_noticed(tmp_path: Path) -> None:
    run, folder, linked = tmp_path / "run", tmp_path / "checkpoints", tmp_path / "linked"
    train(run, folder)
    with pytest.raises(ConfigError, match="there are checkpoints outside of its directory") as caught:
        train(run, start_over=True)
    assert caught.value.got == "step-00000002"
    shutil.rmtree(folder)  # as if it was not mounted
    refused(run)
    train(run, start_over=True)
    assert steps_in(folder) == [2]

    (tmp_path / "disk").mkdir()
    linked.mkdir()
    (linked / "checkpoints").symlink_to(tmp_path / "disk")
    train(linked)
    shutil.rmtree(tmp_path / "disk" / "step-00000002")
    refused(linked)
    train(linked, start_over=True)
    assert steps_in(tmp_path / "disk") == [2]


def test_a_missing_newest_checkpoint_is_reported_and_a_run_without_any_begins_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, steps=3, checkpoint_every=1)
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    train(run, steps=3)
    assert (
        "the checkpoint of step 3, which the run has saved, is missing" in (run / "logs" / "worker-0.log").read_text()
    )
    killed = tmp_path / "killed"  # before its first checkpoint
    train(killed)
    shutil.rmtree(killed / "checkpoints" / "step-00000002")
    events = [event for event in RunDirectory(killed).read_events() if event["event"] == "started"]
    (killed / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    train(killed)
    assert not (killed / "earlier-1").exists()


def test_each_run_of_a_restarted_script_starts_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(two, steps=1)
    monkeypatch.setenv(LAUNCH_VARIABLE, "first")
    train(one, start_over=True)  # nothing to move
    monkeypatch.setenv(RESTARTS_VARIABLE, "1")  # as if the script had failed before the second run
    train(one, start_over=True, steps=3)
    assert not (one / "earlier-1").exists()
    assert len(RunDirectory(one).read_metrics()) == 3
    for steps in (2, 3):
        train(two, start_over=True, steps=steps)
        assert [path.name for path in two.glob("earlier-*")] == ["earlier-1"]
    assert steps_in(two / "earlier-1" / "checkpoints") == [1]
    monkeypatch.setenv(LAUNCH_VARIABLE, "second")
    train(two, start_over=True)
    assert steps_in(two / "earlier-2" / "checkpoints") == [2, 3]


PRINTS_ITS_LAUNCH = """
import sys
from pathlib import Path
from manyhands.surroundings import is_restart, launch_id
with Path(sys.argv[1]).open("a") as file:
    print(launch_id(), file=file)
sys.exit(not is_restart())
"""


@pytest.mark.parametrize(
    "launcher",
    [
        [*MANYHANDS, "run", "--workers", "1"],
        pytest.param([*TORCHRUN, "--nproc-per-node", "1"], marks=pytest.mark.slow),
    ],
)
def test_restarts_of_a_script_have_one_launch_id_and_other_launches_another(
    tmp_path: Path, launcher: list[str]
) -> None:
    script, found = tmp_path / "script.py", tmp_path / "found"
    script.write_text(PRINTS_ITS_LAUNCH)
    for _ in range(2):
        subprocess.run([*launcher, "--max-restarts", "1", str(script), str(found)], check=True, timeout=240)
    first, again, second, second_again = found.read_text().split()
    assert first == again != second == second_again
    assert "None" not in (first, second)


@pytest.mark.slow
def test_the_command_starts_over_once_although_its_workers_are_restarted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    shutil.rmtree(run / "checkpoints")
    command = [*MANYHANDS, "train", str(SUPPORT / "faulty.toml"), *PATIENT, "--workers", "1", "--run-dir", str(run)]
    fault = {"FAULT": "kill-once forward 9 0", "FAULT_TIME": str(tmp_path / "fault")}
    environment = os.environ | fault | {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*command, "--start-over", "--snapshot-every", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fault").exists()
    assert [path.name for path in run.glob("earlier-*")] == ["earlier-1"]
    assert [metrics.step for metrics in RunDirectory(run).read_metrics()] == [1, 2, 3, 4, 5]
    assert len(RunDirectory(run / "earlier-1").read_metrics()) == 2
