"""Listeners receive the figures of a run on one worker. None of them changes, delays or ends it, unless it asks."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import manyhands as mh
from manyhands.doctor.runs import run_history
from manyhands.engine.step.figures import Evaluation
from manyhands.errors import ConfigError, Interrupted
from manyhands.listeners import CSVListener, dispatch, network
from manyhands.listeners.network import InOwnThread
from manyhands.listeners.run_directory import RunDirectory
from manyhands.training.snapshotting import SNAPSHOT_EVERY_VARIABLE
from support.full_disk import run_on_small_disk
from support.listening import STEPS, Counts, recipe_of
from test_report import step_metrics, summary

SUPPORT = Path(__file__).resolve().parent / "support"


def run_script(folder: Path, *services: str, workers: int = 3) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manyhands.cli.main", "run", "--workers", str(workers), "--max-restarts", "1"]
    variables = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    variables[SNAPSHOT_EVERY_VARIABLE] = "100"  # a killed run resumes from its checkpoint
    done = subprocess.run(
        [*command, str(SUPPORT / "listening.py"), str(folder), *services],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done


def seen_in(folder: Path) -> list[list[Any]]:
    """The calls of `Counts`, by process in the order in which these started."""
    files = sorted(folder.glob("seen-*"), key=lambda file: file.stat().st_ctime)
    assert all(file.name.startswith("seen-0-") for file in files)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def digest_without_listeners() -> str:
    return mh.train(recipe_of(validation=None), steps=STEPS, show=False).digest


def test_one_that_raises_and_one_that_hangs_do_not_disturb_a_run(tmp_path: Path) -> None:
    started = time.monotonic()
    errors = run_script(tmp_path).stderr
    found = [json.loads((tmp_path / f"worker-{rank}.json").read_text()) for rank in range(3)]
    assert {each["digest"] for each in found} == {digest_without_listeners()}

    seen = seen_in(tmp_path)
    assert [call[:2] for call in seen if call[0] in ("began", "evaluated", "ended")] == [
        ["began", 0],
        *(["evaluated", step] for step in (2, 4, 5)),
        ["ended", "completed"],
    ]
    assert [call[1] for call in seen if call[0] == "step"] == [1, 2, 3, 4, 5]
    calls = [call[:2] for call in seen]
    assert calls.index(["evaluated", 2]) == calls.index(["step", 2]) + 1
    times = {call[1]: call[-1] for call in seen if call[0] in ("began", "step")}
    assert times[5] - times[0] < 60  # Hangs waits for 600 seconds
    assert time.monotonic() - started < 200
    of_workers = [call[2] for call in seen if call[0] == "step"]
    assert [len(each) for each in of_workers] == [0, 3, 3, 3, 3]
    assert all(seconds > 0 and memory > 1 << 20 for each in of_workers for seconds, memory in each)

    events = [event["event"] for event in RunDirectory(tmp_path / "run").read_events()]
    assert events.count("listener failed") == events.count("not sent") == 1
    assert "saved" in [call[1] for call in seen if call[0] == "event"]
    assert (
        errors.count("the listener Raises failed, and the run continues without it: ValueError: out of cheese (") == 1
    )
    assert errors.count("the listener Hangs has not sent: the start of the run, 5 steps, 3 validations, ") == 1


def test_the_time_at_the_end_of_a_run_is_limited() -> None:
    assert dispatch.END_SECONDS_AFTER_FAILURE < dispatch.END_SECONDS <= 10


# - Failures, and requests to stop, with one worker


def made(name: str, network: bool = False, **methods: Callable[..., Any]) -> mh.Listener:
    return type(name, (mh.Listener,), {"network": network, **methods})()


def raising(kind: type[BaseException]) -> Callable[..., None]:
    def method(self: object, *arguments: object) -> None:
        raise kind("sorry\nand more")

    return method


def test_every_failure_is_reported_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = {f"In_{method}": made(f"In_{method}", **{method: raising(RuntimeError)}) for method in CALLS}
    bad |= {f"Far_{method}": made(f"Far_{method}", network=True, **{method: raising(OSError)}) for method in CALLS}
    bad["Exits"] = made("Exits", step=raising(SystemExit))
    bad["Answers"] = made("Answers", step=lambda *_: True)
    bad["FarAnswers"] = made("FarAnswers", network=True, evaluated=lambda *_: "stop")
    counts = Counts(tmp_path)
    found = mh.train(recipe_of(), steps=STEPS, run_dir=tmp_path / "run", listeners=[*bad.values(), counts], show=False)
    assert found.digest == digest_without_listeners()
    assert [call[1] for call in seen_in(tmp_path) if call[0] == "step"] == [1, 2, 3, 4, 5]
    errors = capfd.readouterr().err
    for name in bad:
        assert errors.count(f"the listener {name} failed, and the run continues without it: ") == 1, name
    assert errors.count("RuntimeError: sorry (test_listeners.py, line ") == len(CALLS)
    assert "Answers failed, and the run continues without it: TypeError: a listener returned True, but only" in errors
    assert (tmp_path / "run" / "logs" / "worker-0.log").read_text().count("the listener Exits failed") == 1


CALLS = ("began", "step", "evaluated", "event", "ended")


def test_what_is_not_a_listener_is_refused() -> None:
    for wrong in (Counts, print, None):
        with pytest.raises(ConfigError, match="is not a listener"):
            mh.train(recipe_of(), steps=1, listeners=[wrong], show=False)  # type: ignore[list-item]
    for single in (mh.Listener(), "csv", None):
        with pytest.raises(ConfigError, match="listeners is not a list"):
            mh.train(recipe_of(), steps=1, listeners=single, show=False)  # type: ignore[arg-type]


def stopping_run(folder: str, network: bool) -> list[Any]:
    """Train with a listener that requests to stop after step 2. Return what the error says on this worker."""

    class Stops(mh.Listener):
        def __init__(self) -> None:
            self.network, self.asked = network, threading.Event()

        def step(self, metrics: mh.StepMetrics, workers: object) -> Any:
            if metrics.step == 2:
                self.asked.set()
                return mh.stop("the loss is good enough")
            return None

    class Waits(mh.Listener):
        def step(self, metrics: mh.StepMetrics, workers: object) -> None:
            if metrics.step == 2:
                stops.asked.wait(60)
                time.sleep(0.1)  # the thread returns the answer

    stops, counts = Stops(), Counts(Path(folder))
    try:
        mh.train(recipe_of(), steps=9, run_dir=f"{folder}/run", listeners=[stops, Waits(), counts], show=False)
    except Interrupted as error:
        return [error.what, str(error.where).rpartition("/")[2]]
    return []


@pytest.mark.parametrize("network", [False, True])
def test_a_listener_stops_the_run_on_all_workers(network: bool, tmp_path: Path) -> None:
    workers = 1 if network else 2
    found = (
        [stopping_run(str(tmp_path), network)]
        if workers == 1
        else mh.launch(stopping_run, str(tmp_path), network, workers=workers)
    )
    assert found == [["a listener stopped the run after step 3: the loss is good enough", "step-00000003"]] * workers
    event = RunDirectory(tmp_path / "run").read_events()[-1]
    assert (event["event"], event["step"], event["why"]) == ("stopped", 3, "the loss is good enough")
    told = [text for _, text in run_history(RunDirectory(tmp_path / "run")).lines]
    assert told[-1] == "stopped after step 3: the loss is good enough"
    assert [call[1] for call in seen_in(tmp_path) if call[0] in ("step", "ended")] == [1, 2, 3, "interrupted"]
    assert mh.train(recipe_of(), steps=STEPS, run_dir=tmp_path / "run", show=False).digest == digest_without_listeners()


def test_a_validation_may_stop_the_run_and_listeners_hear_of_failures(tmp_path: Path) -> None:
    ends: list[mh.Summary] = []
    stops = made("Stops", evaluated=lambda self, evaluation: mh.stop(f"at {evaluation.step}"))
    keeps = made("Keeps", ended=lambda self, summary: ends.append(summary))
    with pytest.raises(Interrupted, match="a listener stopped the run after step 3: at 2") as stopped:
        mh.train(recipe_of(), steps=9, listeners=[stops, keeps], show=False)

    def loss(model: nn.Module, batch: Any) -> Any:
        if model.training and len(calls) > 20:
            raise ZeroDivisionError("out of crackers")
        calls.append(1)
        return (model(batch) - batch).square().mean()

    calls: list[int] = []
    with pytest.raises(ZeroDivisionError):
        mh.train(recipe_of(loss=loss, validation=None), steps=9, listeners=[keeps], show=False)
    assert [(each.outcome, each.steps, each.error) for each in ends] == [
        ("interrupted", 3, str(stopped.value)),
        ("failed", 3, "out of crackers"),
    ]


# - The thread of a network listener


def test_a_full_queue_drops_figures_of_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "MOST_CALLS", 4)
    monkeypatch.setattr(network, "SLOW_SECONDS", 0.0)
    free, got, reports = threading.Event(), [], []
    busy = threading.Event()

    class Slow(mh.Listener):
        def began(self, facts: Mapping[str, Any]) -> None:
            busy.set()
            free.wait(60)

        def step(self, metrics: mh.StepMetrics, workers: Sequence[Any]) -> None:
            got.append(metrics.step)

        def evaluated(self, evaluation: Evaluation) -> None:
            got.append("validation")

        def event(self, name: str, facts: Mapping[str, Any]) -> None:
            got.append(name)

        def ended(self, summary: mh.Summary) -> None:
            got.append("end")

    listener = InOwnThread(Slow(), reports.append)
    listener.began({})
    assert busy.wait(60)
    for step in range(1, 9):
        listener.step(step_metrics(step), [])
    for _ in range(3):
        listener.evaluated(None)  # type: ignore[arg-type]
        listener.event("saved", {})
    free.set()
    listener.ended(summary())
    assert listener.finish(time.monotonic() + 60) == {"steps": 4}
    assert got == [1, 2, 3, 4, *["validation", "saved"] * 3, "end"]
    assert len(reports) == 3
    assert "has been in one call for 0 s; the run continues" in reports[0]
    assert "the listener test_a_full_queue" not in reports[1]
    assert reports[1].endswith("Slow is too slow: figures of steps are dropped")
    assert reports[2].endswith("Slow has not sent: 4 steps")


# - Files and services


ON_SMALL_DISK = """
import sys
from pathlib import Path
import manyhands as mh
from full_disk import BALLAST, fill
from listening import recipe_of
disk = Path(sys.argv[1])
class Fills(mh.Listener):
    def step(self, metrics, workers):
        if metrics.step == 20:
            fill(disk)
        if metrics.step == 40:
            (disk / BALLAST).unlink()
mh.train(recipe_of(), steps=50, listeners=[mh.listeners.CSVListener(disk / "csv"), Fills()], show=False)
rows = (disk / "csv" / "steps.csv").read_text().splitlines()
assert all(len(row.split(",")) == len(rows[0].split(",")) for row in rows)
steps = [int(row.split(",")[0]) for row in rows[1:]]
assert steps == sorted(set(steps)) and steps[-1] == 50 and 30 not in steps and 10 in steps, steps
"""


def test_a_full_disk_does_not_remove_a_listener(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(SUPPORT), str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")])
    done = run_on_small_disk(
        tmp_path / "disk",
        [sys.executable, "-c", ON_SMALL_DISK, str(tmp_path / "disk")],
        size="64k",
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training continues without a record of its steps by CSVListener: [Errno 28]") == 1
    assert done.stderr.count("the record of the steps by CSVListener continues; ") == 1


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_services_have_each_step_once_after_a_kill(tmp_path: Path) -> None:
    """The run is killed after step 4 and repeats it from the checkpoint of step 3."""
    services = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name)]
    (tmp_path / "kill").touch()
    run_script(tmp_path, *(services or ["none"]), workers=1)
    assert [call[1] for call in seen_in(tmp_path) if call[0] in ("began", "step")] == [0, 1, 2, 3, 4, 3, 4, 5]
    assert json.loads((tmp_path / "worker-0.json").read_text())["digest"] == digest_without_listeners()

    steps, validations = rows_of(tmp_path / "csv" / "steps.csv"), rows_of(tmp_path / "csv" / "validations.csv")
    assert [row[0] for row in steps] == ["step", "1", "2", "3", "4", "5"]
    recorded = RunDirectory(tmp_path / "run").read_metrics()
    column = steps[0].index("loss")
    assert [float(row[column]) for row in steps[1:]] == [each.loss for each in recorded]
    assert [row[:2] for row in validations[1:]] == [[step, "validation.loss"] for step in "245"]
    if importlib.util.find_spec("tensorboard"):
        curves_are_complete(tmp_path / "curves")
    if "mlflow" in services:
        mlflow_is_complete(tmp_path, [each.loss for each in recorded])
    if "wandb" in services:
        folders = sorted((tmp_path / "wandb").glob("offline-run-*"))  # one for each process, in the order of time
        assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "the run has one id"
        assert wandb_steps(folders[-1]) == [4, 5]


def curves_are_complete(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [point.step for point in events.Scalars("validation/loss")] == [2, 4, 5]


def mlflow_is_complete(folder: Path, losses: list[float]) -> None:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(f"file://{folder}/mlflow")
    (run,) = client.search_runs([client.get_experiment_by_name("cheese").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == list(enumerate(losses, start=1))
    assert [point.step for point in client.get_metric_history(run.info.run_id, "validation.loss")] == [2, 4, 5]
    assert (run.info.status, run.data.params["batch.global_size"]) == ("FINISHED", "12")


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a file in the format of LevelDB's logs: blocks of 32 KiB with (checksum, length, kind) chunks."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (1 << 15) - at % (1 << 15) < 7:
            at += -at % (1 << 15)
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def wandb_steps(folder: Path) -> list[int]:
    """The steps in the history of an offline run."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    steps = []
    for data in records_of(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            steps.append(values["step"])
            assert "loss" in values
            assert ("validation.loss" in values) == (values["step"] in (2, 4, 5))
    return steps


def test_wandb_has_one_run_with_several_workers(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_script(tmp_path, "wandb")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert wandb_steps(folder) == [1, 2, 3, 4, 5]
    stored = json.loads((tmp_path / "run" / "listeners.json").read_text())
    assert folder.name.endswith(stored["wandb"])


def test_a_new_object_opens_nothing(tmp_path: Path) -> None:
    CSVListener(tmp_path / "csv")
    mh.listeners.TensorBoardListener(tmp_path / "curves")
    mh.listeners.WandbListener(dir=str(tmp_path))
    mh.listeners.MLflowListener(f"file://{tmp_path}/mlflow")
    assert not list(tmp_path.iterdir())
