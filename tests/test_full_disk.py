"""A full disk under the run directory is reported once, and ends nothing. The disks are real ones, in memory."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import manyhands as mh
from manyhands.documents.recipe_file import load_recipe
from manyhands.listeners.run_directory import RunDirectory
from support.full_disk import run_on_small_disk
from test_faults import MANYHANDS, PATIENT, SUPPORT

STEPS = 32


def test_a_run_survives_a_full_disk_and_a_killed_worker_on_it(tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    options = f"--workers 2 --steps {STEPS} --run-dir {disk}/run --snapshot-every 1 --json"
    command = [*MANYHANDS, "train", str(SUPPORT / "faulty.toml"), *PATIENT, *options.split()]
    # Standard output is on the full disk, too; the losses are printed there by worker 0 and by worker 1 to its log.
    script = f"{shlex.join(command)} > {disk}/output; code=$?; cp -r {disk} {kept}; exit $code"
    environment = {
        **os.environ,
        "DISK": str(disk),
        "CHATTY": "1",
        "FAULT": "fill-once forward 5 0;kill-once forward 25 1;free-once forward 29 0",
        "FAULT_TIME": str(tmp_path / "fault"),
    }
    done = run_on_small_disk(disk, ["sh", "-c", script], env=environment)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("fault-*"))) == 3
    loaded = load_recipe(SUPPORT / "faulty.toml", [])
    with mh.Engine(loaded.recipe, loaded.strategy) as engine:
        losses = [engine.step(batch).loss for batch in engine.batches(STEPS)]
        digest = engine.digest()
    summary = json.loads((kept / "output").read_text().splitlines()[-1])
    assert (summary["digest"], summary["loss"]) == (digest, losses[-1])
    for attempt in done.stderr.split("restarting (1 of 3)"):  # before and after the restart
        assert attempt.count("training continues without a record of its metrics: the run directory can't be") == 1
    assert done.stderr.count("worker 1 was killed by SIGKILL") == 1
    run = RunDirectory.open_existing(kept / "run")
    recorded = [metrics.step for metrics in run.read_metrics()]
    assert recorded[:2] == [1, 2]
    assert recorded[-1] == STEPS
    assert len(recorded) < STEPS
    events = [event["event"] for event in run.read_events()]
    assert "not recorded" in events
    assert events[-1] == "ended"


AMENDS = """
import sys
from pathlib import Path
import manyhands as mh
from full_disk import BALLAST, fill
from models import gpt_recipe
disk, kept = Path(sys.argv[1]), Path(sys.argv[2])
def train(**more):
    return mh.train(gpt_recipe(), steps=2, run_dir=disk / "run", checkpoint_dir=kept, show=False, **more)
mh.train(gpt_recipe(), steps=1, run_dir=disk / "run", checkpoint_dir=kept, show=False)
fill(disk)
try:
    train(skip_steps=[2])
except mh.ConfigError as error:
    assert str(error.where).endswith("amendments.json"), error
else:
    raise AssertionError("new amendments are not recorded")
(disk / BALLAST).unlink()
train(skip_steps=[2])
fill(disk)
train(skip_steps=[2])  # recorded already
"""


def test_new_amendments_are_refused_if_a_full_disk_cannot_record_them(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(SUPPORT), str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")])
    done = run_on_small_disk(
        tmp_path / "disk",
        [sys.executable, "-c", AMENDS, str(tmp_path / "disk"), str(tmp_path / "kept")],
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr


BOARD = """
import sys
from pathlib import Path
from full_disk import BALLAST, fill
from test_report import step_metrics
from manyhands.listeners import tensorboard
disk, failed = Path(sys.argv[1]), []
log = tensorboard.TensorBoardListener(disk / "curves")
log.began({"step": 0})
for step in range(1, 200):
    if step == 20:
        fill(disk)
    if step == 150:
        (disk / BALLAST).unlink()
        tensorboard.RETRY_SECONDS = 0.0
    try:
        log.step(step_metrics(step), [])
    except OSError:
        failed.append(step)
log.ended(None)
files = sorted((disk / "curves").iterdir(), key=lambda file: file.name)
assert len(files) == 2, files
assert failed and failed[-1] < 150, failed
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
steps = {event.step for event in EventFileLoader(str(files[1])).Load() if event.HasField("summary")}
assert steps == set(range(150, 200)), steps
"""


def test_curves_for_tensorboard_continue_after_a_full_disk(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(SUPPORT), str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")])
    done = run_on_small_disk(
        tmp_path / "disk",
        [sys.executable, "-c", BOARD, str(tmp_path / "disk")],
        size="256k",
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr


JOBS = """
import sys, tempfile
from pathlib import Path
import manyhands as mh
from full_disk import BALLAST, fill
disk, rest = Path(sys.argv[1]), {"progress": False}
tempfile.tempdir = str(disk / "temporary")
(disk / "temporary").mkdir()
made = mh.Dataset.from_records(range(1000)).sort_by()
jobs = {
    "the output folder can't be written": lambda: made.write(disk / "out", workers=0, **rest).records,
    "the output folder can't be written: ": lambda: made.write(disk / "ranks", engine="rank 0 of 1", **rest).records,
    "the folder for temporary files can't be written": lambda: made.count(workers=0, **rest),
}
for expected, job in jobs.items():
    fill(disk)
    try:
        job()
    except mh.ManyhandsError as error:
        assert expected in str(error), error
        assert "No space left on device" in str(error), error
    else:
        raise AssertionError(f"no error: {expected}")
    (disk / BALLAST).unlink()
    assert job() == 1000
left = {path.name for path in disk.iterdir()} | {path.name for path in (disk / "temporary").glob("*/*")}
assert left == {"temporary", "out", "ranks"}, left
"""


def test_data_jobs_name_a_full_disk_and_run_again_with_space(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    done = run_on_small_disk(
        tmp_path / "disk",
        [sys.executable, "-c", JOBS, str(tmp_path / "disk")],
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
