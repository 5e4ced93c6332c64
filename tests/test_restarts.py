"""After a worker's failure all workers are restarted, and the run ends with the digest of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

import faults
import manyhands as mh
from manyhands.cli.workers import Bounds, bounds, workers_for
from manyhands.comm.local import LocalGroup
from manyhands.config import Batch
from manyhands.errors import DataError, Position, WorkerError
from manyhands.launching.restarts import Restart, run_with_restarts
from manyhands.listeners.run_directory import RunDirectory
from manyhands.members.reports import StatusFile, read_status
from test_faults import SUPPORT, Run, stall_seconds, training


def failed(step: int | None = 4, micro_batch: int | None = None, raised: str = "") -> WorkerError:
    what = f"worker 1 failed: {raised}" if raised else "worker 1 was killed by SIGKILL"
    error = WorkerError(what, rank=1, where="worker 1, somewhere", position=Position("somewhere", step, micro_batch))
    error.raised = raised
    return error


def raised(step: int, micro_batch: int = 2) -> WorkerError:
    return failed(step, micro_batch, "RuntimeError: out of cheese")


class Launches:
    """Launches that end in turn as given: (error, or None for success; number of steps saved before the end)."""

    def __init__(self, *ends: tuple[WorkerError | None, int]) -> None:
        self.ends, self.saved, self.restarts, self.failures = list(ends), 0, list[Restart](), list[int]()

    def run(self, failures: int) -> None:
        self.failures.append(failures)
        error, steps = self.ends.pop(0)
        self.saved += steps
        if error is not None:
            raise error

    def run_all(self, limit: int = 3) -> None:
        run_with_restarts(
            self.run,
            saved_step=lambda: (0, self.saved),
            limit=limit,
            on_restart=self.restarts.append,
            samples_of=Batch(global_size=8, micro_size=2).samples_of,
        )


def test_the_workers_are_restarted_until_they_succeed() -> None:
    launches = Launches((failed(), 0), (failed(), 0), (failed(), 0), (None, 9))
    launches.run_all()
    assert [restart.number for restart in launches.restarts] == [1, 2, 3]
    assert launches.failures == [0, 1, 2, 3]


def test_a_range_of_workers_shrinks_with_each_failure() -> None:
    assert [Bounds(2, 4).after(failures) for failures in range(6)] == [4, 4, 3, 2, 2, 2]
    assert bounds("2:8") == (2, 8)
    assert bounds("3") == (3, 3)
    for wrong in ("", "0", "2:1", ":3", "x", "1:2:3"):
        with pytest.raises(typer.BadParameter):
            bounds(wrong)
    assert workers_for(Bounds(1, 99), 1, 3).most <= 3
    assert workers_for(Bounds(5, 99), 1, 3) == (5, 5)  # the recipe's own check refuses it


def test_progress_resets_the_number_of_failures() -> None:
    launches = Launches(*[(failed(), 1)] * 20, (None, 1))
    launches.run_all(limit=1)
    assert {restart.number for restart in launches.restarts} == {1}


def test_a_later_training_is_progress_whatever_its_steps() -> None:
    saved, ends = iter([(0, 0), (0, 9), (0, 9), (1, 1), (1, 1)]), [failed(), failed(), None]

    def run(failures: int) -> None:
        if (error := ends.pop(0)) is not None:
            raise error

    run_with_restarts(run, saved_step=lambda: next(saved), limit=1, on_restart=lambda restart: None)
    assert ends == []


def test_without_progress_restarts_are_limited() -> None:
    launches = Launches((failed(), 2), *[(failed(), 0)] * 9)
    with pytest.raises(WorkerError, match="was killed") as caught:
        launches.run_all(limit=3)
    assert len(launches.ends) == 6
    assert "not restarted: this is failure 4 without progress since step 2" in str(caught.value.hint)


def test_an_exception_that_repeats_in_the_same_micro_batch_is_final() -> None:
    launches = Launches((raised(4), 0), (raised(4), 0), (None, 0))
    with pytest.raises(WorkerError, match="out of cheese") as caught:
        launches.run_all()
    assert len(launches.restarts) == 1
    assert "samples 28 to 29 in the run's order" in str(caught.value.where)
    assert "the previous attempt failed at the same position" in str(caught.value.hint)


def test_an_exception_at_another_position_is_not_final() -> None:
    other = failed(4, 2, "RuntimeError: out of milk")
    launches = Launches((raised(4), 0), (raised(5), 0), (raised(5, 3), 0), (raised(4), 0), (other, 0), (None, 0))
    launches.run_all(limit=9)
    assert len(launches.restarts) == 5


def test_a_kill_that_repeats_at_the_same_position_is_not_final() -> None:
    launches = Launches((failed(4, 2), 0), (failed(4, 2), 0), (None, 0))
    launches.run_all()
    assert len(launches.restarts) == 2


def test_the_samples_of_a_worker_that_was_killed_too_often_are_named() -> None:
    with pytest.raises(WorkerError) as caught:
        Launches((failed(4, 2), 0)).run_all(limit=0)
    assert caught.value.where == "worker 1, somewhere, samples 28 to 29 in the run's order"
    assert caught.value.position == Position("somewhere", 4, 2)


def test_an_error_that_a_person_must_fix_is_raised_at_once() -> None:
    error = failed(raised="DataError: no such file")
    error.__cause__ = DataError("no such file")
    with pytest.raises(WorkerError) as caught:
        Launches((error, 0)).run_all()
    assert caught.value is error


def test_an_exception_before_the_first_step_is_raised_at_once() -> None:
    error = failed(None, raised="FileNotFoundError: corpus.bin")
    with pytest.raises(WorkerError) as caught:
        Launches((error, 0)).run_all()
    assert caught.value is error


def test_a_kill_before_the_first_step_causes_a_restart() -> None:
    launches = Launches((failed(None), 0), (None, 0))
    launches.run_all()
    assert len(launches.restarts) == 1


def test_a_single_worker_that_fails_leaves_its_position_and_no_time_limit(tmp_path: Path) -> None:
    """Without the position, the launcher would take the error for one before the first step, and not restart."""
    for fails in (True, False):
        group = LocalGroup(torch.device("cpu"), StatusFile(str(tmp_path / "status"), stall_seconds=1.0))
        group.status("forward", 3, 1)
        if fails:
            group.fail(RuntimeError("out of cheese"))
        group.close()
        status = read_status(tmp_path / "status")
        assert status is not None
        assert status.position == (Position("forward", 3, 1) if fails else Position())
        assert status.stall_seconds > 1e9


def test_without_restarts_the_workers_error_is_unchanged() -> None:
    error = failed()
    with pytest.raises(WorkerError) as caught:
        Launches((error, 0)).run_all(limit=0)
    assert str(caught.value) == str(error)


# - Real workers


def train_with_fault(folder: Path, fault: str, *options: str) -> Run:
    return Run(folder, [*training(folder, "auto", "3"), "--json", *options], fault).wait()


def digest_of(run: Run) -> str:
    digest: str = json.loads(run.output.splitlines()[-1])["digest"]
    return digest


@pytest.fixture(scope="module")
def undisturbed() -> str:
    loaded = mh.load_recipe(SUPPORT / "faulty.toml")
    return mh.train(loaded.recipe, steps=5, show=False).digest


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        pytest.param("kill-once update", ("--checkpoint-every", "1"), marks=pytest.mark.slow),
        pytest.param("kill-once forward", (), marks=pytest.mark.slow),
        pytest.param("raise-once backward", ("--checkpoint-every", "2"), marks=pytest.mark.slow),
        pytest.param("stop-once backward", ("--checkpoint-every", "1"), marks=pytest.mark.slow),
    ],
)
def test_the_run_ends_with_the_digest_of_an_undisturbed_run(
    tmp_path: Path, undisturbed: str, fault: str, options: tuple[str, ...]
) -> None:
    stall = ("--set", f"strategy.stall_seconds={stall_seconds(fault)}")
    run = train_with_fault(tmp_path / "run", fault, "--snapshot-every", "never", *options, *stall)
    assert run.process.returncode == 0, run.output
    assert digest_of(run) == undisturbed
    assert "restarting (1 of 3) with 2 workers" in run.output
    assert run.left_behind() == []
    events = RunDirectory.open_existing(tmp_path / "run" / "directory").read_events()
    kinds = [event["event"] for event in events if "saved" not in event["event"]]
    assert kinds == ["started", "failed", "started", "ended"]
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
    resumed = [event for event in events if event["event"] == "started"][-1]
    saved = [event["step"] for event in events[: events.index(resumed)] if event["event"] == "saved"]
    assert resumed["step"] >= max(saved, default=0)
    summary = json.loads(run.output.splitlines()[-1])
    assert summary["failures"] == 1
    assert summary["repeated_steps"] == 2 - resumed["step"]
    assert summary["lost_seconds"] > 0


@pytest.mark.slow
def test_a_micro_batch_that_always_fails_is_named_with_its_samples(tmp_path: Path) -> None:
    run = train_with_fault(tmp_path / "run", "raise forward", "--snapshot-every", "never")
    assert run.process.returncode == 1
    assert run.output.count("restarting") == 1
    assert "samples 18 to 19 in the run's order" in run.output, run.output
    assert "the run is not restarted: the previous attempt failed at the same position" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1001, 7])
def test_random_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Short form of `make faults`, without full disks, links, closed pipes and clocks."""
    monkeypatch.setenv("PYTHONPATH", "")
    expected = faults.undisturbed(tmp_path)
    session = faults.Session(tmp_path / str(seed), seed, faults.SURROUNDINGS, hosts=False)
    assert session.train() == expected
    assert session.happened.total() > 0
