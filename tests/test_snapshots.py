"""A snapshot in memory outlives the workers and restores every bit. A partial snapshot is ignored."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.checkpoint import snapshot
from manyhands.checkpoint.snapshot import SNAPSHOT_MEMORY_VARIABLE, SnapshotMemory, Training, take_snapshot
from manyhands.cli.workers import SnapshotStore
from manyhands.comm.group import Group
from manyhands.launching.launcher import run_workers
from manyhands.listeners.run_directory import RunDirectory
from manyhands.offload.process_memory import free_memory_bytes
from manyhands.training import snapshotting as snapshots
from support.models import conv_recipe, gpt_recipe
from support.optimizers import keeping_recipe
from support.threads import run_threads
from test_faults import SUPPORT
from test_restarts import digest_of, train_with_fault

STEPS = 4


@pytest.fixture
def memory() -> Iterator[SnapshotMemory]:
    made = SnapshotMemory.create(4)
    yield made
    made.close()


def train(
    recipe: mh.Recipe,
    workers: int,
    sharding: str,
    memory: SnapshotMemory,
    *,
    taken: tuple[int, ...] = (),
    load: bool = False,
) -> str:
    """Train up to step 4, with snapshots after the steps in `taken`. Return the digest."""

    def work(group: Group) -> str:
        mine = SnapshotMemory.at(memory.address())
        with mh.Engine(recipe, mh.Strategy(sharding=sharding), group) as engine:
            if load:
                engine.load_snapshot(mine)
            for batch in engine.batches(STEPS):
                digest = engine.step(batch, digest=True).digest
                if engine.step_index in taken:
                    take_snapshot(engine, mine, digest)
            return engine.digest()

    return run_threads(workers, work)[0]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe_of", [gpt_recipe, conv_recipe, lambda precision: keeping_recipe("count in the group")])
def test_a_snapshot_resumes_with_any_number_of_workers(
    memory: SnapshotMemory, recipe_of: object, precision: str
) -> None:
    recipe = recipe_of(precision)  # type: ignore[operator]
    undisturbed = train(recipe, 1, "ddp", memory)
    assert train(recipe, 2, "zero2", memory, taken=(1, 2)) == undisturbed
    for workers, sharding in ((3, "ddp"), (1, "zero1"), (2, "zero3")):
        assert train(recipe, workers, sharding, memory, load=True) == undisturbed
        newest = memory.newest()
        assert newest is not None
        assert newest.manifest.step == 2


def test_a_partial_snapshot_is_ignored(memory: SnapshotMemory) -> None:
    recipe = gpt_recipe("fp32")
    assert memory.newest() is None
    undisturbed = train(recipe, 2, "zero2", memory, taken=(1, 2, 3))
    slots = json.loads(memory.address())
    records = [Path(record) for record, _ in slots]
    newest = max(records, key=lambda record: json.loads(record.read_bytes()[16:])["manifest"]["step"])
    whole = newest.read_bytes()
    for cut in (0, 8, 16, len(whole) // 2, len(whole) - 1):  # as far as worker 0 came
        newest.write_bytes(whole[:cut])
        found = memory.newest()
        assert found is not None
        assert found.manifest.step == 2
    assert train(recipe, 3, "zero1", memory, load=True) == undisturbed


def test_restarted_workers_also_write_the_older_slot(memory: SnapshotMemory) -> None:
    recipe = gpt_recipe("fp32")
    train(recipe, 1, "zero2", memory, taken=(1,))
    train(recipe, 2, "zero2", memory, load=True, taken=(2, 3))
    steps = sorted(
        json.loads(Path(record).read_bytes()[16:])["manifest"]["step"] for record, _ in json.loads(memory.address())
    )
    assert steps == [2, 3]


def test_when_memory_is_short_no_snapshot_is_taken_and_this_is_reported(
    memory: SnapshotMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    monkeypatch.setenv(SNAPSHOT_MEMORY_VARIABLE, memory.address())
    monkeypatch.setattr(snapshots, "free_memory_bytes", lambda: 100 << 10)

    with mh.Engine(gpt_recipe("fp32")) as engine:
        mine = snapshots.Snapshots(engine, None, reports.append)
        engine.step(next(engine.batches()))
        mine.after_step(None, last=False)
    assert memory.newest() is None
    assert "100 KiB free memory" in reports[0]


def test_memory_of_earlier_snapshots_counts_as_free(memory: SnapshotMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, reports = gpt_recipe("fp32"), list[str]()
    train(recipe, 1, "zero2", memory, taken=(1, 2))
    held = memory.held_bytes()
    monkeypatch.setenv(SNAPSHOT_MEMORY_VARIABLE, memory.address())
    for free, newest_step in ((held + (64 << 10), 3), (1 << 10, None)):
        monkeypatch.setattr(snapshots, "free_memory_bytes", lambda free=free: free)
        monkeypatch.setattr(snapshots, "_trainings", itertools.count())
        with mh.Engine(recipe) as engine:
            mine = snapshots.Snapshots(engine, None, reports.append)
            mine.load()
            engine.step(next(engine.batches()))
            mine.after_step(None, last=False)
        newest = memory.newest()
        assert (None if newest is None else newest.manifest.step) == newest_step
    assert len(reports) == 1
    assert memory.held_bytes() == 0


@pytest.fixture
def snapshots_every_step(memory: SnapshotMemory, monkeypatch: pytest.MonkeyPatch) -> SnapshotMemory:
    """Set the environment of a worker whose launcher has this memory, with a snapshot after each step but the last."""
    monkeypatch.setenv(SNAPSHOT_MEMORY_VARIABLE, memory.address())
    monkeypatch.setenv(snapshots.SNAPSHOT_EVERY_VARIABLE, "1")
    monkeypatch.setattr(snapshots, "_trainings", itertools.count())
    return memory


def test_a_training_does_not_load_the_snapshot_of_an_earlier_one(
    snapshots_every_step: SnapshotMemory, tmp_path: Path
) -> None:
    recipe = gpt_recipe("fp32")
    mh.train(recipe, steps=4, show=False)
    second = mh.train(recipe, steps=2, show=False)
    assert second.steps == 2
    third = mh.train(recipe, steps=3, run_dir=tmp_path / "third", show=False)
    assert third.steps == 3
    newest = snapshots_every_step.newest()
    assert newest is not None
    assert (newest.of.number, newest.manifest.step) == (2, 2)  # more than (0, 3): the script came further
    assert SnapshotStore(snapshots_every_step, None).newest_step() == (2, 2)
    mh.train(replace(recipe, seed=5), steps=2, show=False)


def test_a_finished_training_leaves_no_snapshot_for_another_one(snapshots_every_step: SnapshotMemory) -> None:
    """A restarted script may skip a finished training. Without run directories, both trainings look the same."""
    recipe = gpt_recipe("fp32")
    undisturbed = mh.train(recipe, steps=2, show=False).digest
    mh.train(recipe, steps=4, show=False)
    assert snapshots_every_step.newest() is None
    snapshots._trainings = itertools.count(1)
    assert mh.train(recipe, steps=2, show=False).digest == undisturbed


def test_a_restarted_script_finds_its_snapshot(
    snapshots_every_step: SnapshotMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = gpt_recipe("fp32")
    undisturbed = mh.train(recipe, steps=4, show=False).digest
    mh.train(recipe, steps=3, run_dir=tmp_path / "run", show=False)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(path)
    monkeypatch.setattr(snapshots, "_trainings", itertools.count(1))
    assert mh.train(recipe, steps=4, run_dir=tmp_path / "run", show=False).digest == undisturbed
    assert RunDirectory(tmp_path / "run").read_events()[-3]["source"] == "snapshot"


def test_a_snapshot_partly_overwritten_by_another_training_is_ignored(
    memory: SnapshotMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mh.Engine(gpt_recipe("fp32")) as engine:
        mine = SnapshotMemory.at(memory.address(), Training(1, ""))
        for batch in engine.batches(3):
            engine.step(batch)
            take_snapshot(engine, mine, None)
        monkeypatch.setattr(snapshot, "owned_pieces", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take_snapshot(engine, SnapshotMemory.at(memory.address(), Training(0, "")), None)
    newest = mine.newest()
    assert newest is not None
    assert newest.manifest.step == 2


def test_a_launcher_inside_a_worker_does_not_pass_on_the_snapshot_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SNAPSHOT_MEMORY_VARIABLE, "that of the outer launcher")
    run_workers([sys.executable, "-c", f"import os; exit(bool(os.environ['{SNAPSHOT_MEMORY_VARIABLE}']))"], workers=1)


def test_free_memory_is_less_than_the_machines_memory() -> None:
    assert 0 < free_memory_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture(scope="module")
def undisturbed() -> str:
    loaded = mh.load_recipe(SUPPORT / "faulty.toml")
    return mh.train(loaded.recipe, steps=5, show=False).digest


@pytest.mark.parametrize(
    "fault",
    [
        "kill-once snapshot 5 1",
        *(pytest.param(f"kill-once {place}", marks=pytest.mark.slow) for place in ("update", "snapshot 5 0")),
        pytest.param("kill-once snapshot 5 1; kill-once snapshot 3 0; kill-once update 1 0", marks=pytest.mark.slow),
    ],
)
def test_a_killed_worker_costs_at_most_a_step_and_reads_no_checkpoint(
    tmp_path: Path, undisturbed: str, fault: str
) -> None:
    run = train_with_fault(tmp_path / "run", fault, "--snapshot-every", "1")
    assert run.process.returncode == 0, run.output
    assert digest_of(run) == undisturbed
    assert run.left_behind() == []
    events = RunDirectory.open_existing(tmp_path / "run" / "directory").read_events()
    began = [event for event in events if event["event"] == "started"]
    assert len(began) == fault.count(";") + 2
    assert {event["source"] for event in began[1:]} <= {"snapshot", None}
    assert all(event["repeats"] <= 1 for event in began)
    assert began[-1]["source"] == "snapshot"
