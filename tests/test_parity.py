"""The guarantee itself, with real processes: one digest for all shardings, worker counts, transports and resumes.

Each (workers, transport) is started once, because importing torch takes seconds per process. Its workers train all
shardings and precisions one after the other and write checkpoints; half of them also resume from those of others.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import manyhands as mh
from manyhands.launching.launcher import run_workers
from oracle import oracle_run
from support.models import GPT_UNITS, OWNED, gpt_recipe
from support.shared_runs import folder_of_all_processes, made_once
from support.training import train_with_engine

STEPS, SAVED_AT = 3, 2  # the last step goes on to the second epoch, also where it follows a resume
SHARDINGS, PRECISIONS = ("ddp", "zero1", "zero2", "zero3"), ("fp32", "bf16")
WORKER = Path(__file__).parent / "support" / "parity_worker.py"


class Launch(NamedTuple):
    """A number of workers and their transport. rest: only what the launch without it has left out."""

    workers: int
    group: str
    rest: bool = False

    def __str__(self) -> str:
        return f"{self.workers}-{self.group}{'-rest' if self.rest else ''}"


class Resume(NamedTuple):
    """A run that is stopped in one launch and resumed in another."""

    source: Launch
    source_stage: str
    target: Launch
    target_stage: str
    precision: str

    def __str__(self) -> str:
        return f"{self.source} {self.source_stage} to {self.target} {self.target_stage} {self.precision}"


SAVING = (Launch(1, "shared-memory"), Launch(2, "distributed"), Launch(3, "shared-memory"), Launch(4, "distributed"))
RESUMING = (Launch(1, "distributed"), Launch(2, "shared-memory"), Launch(3, "distributed"), Launch(4, "shared-memory"))
HOSTS = (Launch(4, "hierarchical"), Launch(6, "hierarchical"))  # 2 workers each; see also test_hosts.py
OTHER_WAYS = tuple(Launch(2, group, rest) for rest in (False, True) for group in ("distributed", "shared-memory"))

SLOW = (Launch(1, "distributed"), Launch(3, "distributed"), Launch(4, "shared-memory"), *HOSTS, *OTHER_WAYS[2:])


def params(launches: Sequence[Launch]) -> list[Any]:
    """Return pytest parameters, some of which are only for `make test-all`."""
    return [pytest.param(launch, id=str(launch), marks=[pytest.mark.slow] * (launch in SLOW)) for launch in launches]


def resumes_of(target: Launch) -> list[Resume]:
    """Resume from every saving launch, in both precisions; all targets cover every pair of shardings."""
    found = []
    for source, precision in product(SAVING, PRECISIONS):
        # (s, t) -> (s + t, s + 2 t) modulo 4 gives every pair once.
        before, after = source.workers + target.workers, source.workers + 2 * target.workers
        found.append(Resume(source, SHARDINGS[before % 4], target, SHARDINGS[after % 4], precision))
    return found


def checkpoints(folder: Path, launch: Launch, sharding: str, precision: str) -> Path:
    """Return the folder of a launch's checkpoints."""
    return folder / f"{launch}-{sharding}-{precision}"


def job(name: str, precision: str, sharding: str, **changes: Any) -> dict[str, Any]:
    """Return a job of a worker, see parity_worker.py."""
    return {
        "name": name,
        "precision": precision,
        "strategy": {"sharding": sharding},
        "units": GPT_UNITS,
        "steps": STEPS,
        "load": None,
        "save": None,
        "save_at": SAVED_AT,
        "optimizer": None,
        "device": "cpu",
    } | changes


OWNED_JOBS = (("ddp", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"))
"""(sharding, precision) in which Muon and AdamW are run together by 2 and by 3 workers."""


def owned_jobs(launch: Launch, folder: Path) -> list[dict[str, Any]]:
    """Return jobs with owned matrices. Launches that resume use another number of workers and another sharding."""
    jobs = []
    for index, (sharding, precision) in enumerate(OWNED_JOBS):
        name, left = f"owned {sharding} {precision}", checkpoints(folder, launch, f"owned-{sharding}", precision)
        jobs.append(job(name, precision, sharding, optimizer="Muon and AdamW", save=str(left)))
        if launch in RESUMING:
            source = next(other for other in SAVING if other.workers == 5 - launch.workers)
            load = checkpoints(folder, source, f"owned-{sharding}", precision) / f"step-{SAVED_AT:08d}"
            target = SHARDINGS[(index + 1) % len(SHARDINGS)]
            jobs.append(job(f"{name} resumed", precision, target, optimizer="Muon and AdamW", load=str(load)))
    return jobs


WAYS: dict[str, dict[str, Any]] = {
    "no overlap": {"strategy": {"sharding": "zero2", "overlap": False}},
    "loader": {"strategy": {"sharding": "ddp", "loader_workers": 1}},
    "one unit": {"strategy": {"sharding": "zero1"}, "units": ()},
    "on a disk": {"strategy": {"sharding": "zero3", "offload": "disk"}},
    "computed twice": {"strategy": {"sharding": "zero3", "activation_checkpointing": ("blocks.*",)}},
}
"""Other settings of a strategy, and what they change in a job."""


def precision_of(way: str, launch: Launch) -> str:
    """Return the precision of a way in a launch: each way has both precisions and both transports without `rest`."""
    number = list(WAYS).index(way) + (launch.group == "distributed") + launch.rest
    return PRECISIONS[number % 2]


def other_ways(launch: Launch, folder: Path) -> list[dict[str, Any]]:
    """Return a job for each other setting of a strategy."""
    jobs = []
    for way, changes in WAYS.items():
        strategy = dict(changes["strategy"])
        if "offload" in strategy:
            strategy["scratch"] = str(folder / f"{launch}-scratch")
        jobs.append(job(way, precision_of(way, launch), strategy["sharding"], **changes | {"strategy": strategy}))
    return jobs


def jobs_of(launch: Launch, folder: Path) -> list[dict[str, Any]]:
    """Return all jobs of the workers of one launch."""
    if launch.rest:
        return other_ways(launch, folder)
    jobs = [
        job(f"{sharding} {precision}", precision, sharding, save=str(checkpoints(folder, launch, sharding, precision)))
        for sharding, precision in product(SHARDINGS, PRECISIONS)
    ]
    if launch in OTHER_WAYS:
        jobs += other_ways(launch, folder)
    if launch.workers in (2, 3):
        jobs += owned_jobs(launch, folder)
    if launch in RESUMING:
        jobs += [
            job(
                str(resume),
                resume.precision,
                resume.target_stage,
                load=str(
                    checkpoints(folder, resume.source, resume.source_stage, resume.precision) / f"step-{SAVED_AT:08d}"
                ),
            )
            for resume in resumes_of(launch)
        ]
    return jobs


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes that run the tests share."""
    return folder_of_all_processes(tmp_path_factory, "parity")


def digests_of(launch: Launch, folder: Path) -> list[dict[str, str]]:
    """Return each worker's digests by job. The first test that needs them starts the workers; other tests wait."""
    if launch in RESUMING:
        for source in SAVING:
            digests_of(source, folder)

    def make(mine: Path) -> None:
        (mine / "jobs.json").write_text(json.dumps(jobs_of(launch, folder)))
        paths = [str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        run_workers(
            [sys.executable, str(WORKER), str(mine), launch.group, str(mine / "jobs.json")],
            workers=launch.workers,
            environment={"PYTHONPATH": os.pathsep.join(paths)} | ({"PRETEND": "hosts"} if launch in HOSTS else {}),
            log_dir=mine,
        )

    mine = made_once(folder / str(launch), make)
    return [json.loads((mine / f"worker-{rank}.json").read_text()) for rank in range(launch.workers)]


@cache
def oracle_digest(precision: str, optimizer: str | None = None) -> str:
    """Return the digest of plain PyTorch."""
    changes = {"optimizer": OWNED[optimizer]} if optimizer else {}
    return oracle_run(gpt_recipe(precision, **changes), STEPS).digests[-1]


def assert_one_digest(launch: Launch, folder: Path, names: list[tuple[str, str]], optimizer: str | None = None) -> None:
    """names: (job, precision)."""
    for rank, digests in enumerate(digests_of(launch, folder)):
        found = {name: digests[name] for name, _ in names}
        assert found == {name: oracle_digest(precision, optimizer) for name, precision in names}, f"worker {rank}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_worker_in_this_process_gives_the_oracles_digest(precision: str) -> None:
    assert train_with_engine(gpt_recipe(precision), mh.Strategy(), steps=STEPS).digest == oracle_digest(precision)


@pytest.mark.parametrize("launch", params(SAVING + RESUMING + HOSTS))
def test_every_sharding_and_precision_gives_the_oracles_digest(launch: Launch, shared_folder: Path) -> None:
    names = [(f"{sharding} {precision}", precision) for sharding, precision in product(SHARDINGS, PRECISIONS)]
    assert_one_digest(launch, shared_folder, names)


@pytest.mark.parametrize("launch", params(OTHER_WAYS))
@pytest.mark.parametrize("way", WAYS)
def test_other_settings_of_a_strategy_change_no_bit(way: str, launch: Launch, shared_folder: Path) -> None:
    assert_one_digest(launch, shared_folder, [(way, precision_of(way, launch))])


@pytest.mark.parametrize("launch", params(RESUMING))
def test_a_run_stopped_in_one_and_resumed_in_another_ends_in_the_same_digest(
    launch: Launch, shared_folder: Path
) -> None:
    assert_one_digest(launch, shared_folder, [(str(resume), resume.precision) for resume in resumes_of(launch)])


@pytest.mark.parametrize("launch", params([one for one in SAVING + RESUMING if one.workers in (2, 3)]))
def test_matrices_by_owner_give_the_oracles_digest_and_change_owners(launch: Launch, shared_folder: Path) -> None:
    names = [(name["name"], name["precision"]) for name in owned_jobs(launch, shared_folder)]
    assert len(names) == (6 if launch in RESUMING else 3)
    assert_one_digest(launch, shared_folder, names, "Muon and AdamW")


def test_resumes_cover_every_pair_of_shardings_worker_counts_and_transports() -> None:
    resumes = [resume for launch in RESUMING for resume in resumes_of(launch)]
    for precision in PRECISIONS:
        some = [resume for resume in resumes if resume.precision == precision]
        assert {(one.source_stage, one.target_stage) for one in some} == set(product(SHARDINGS, SHARDINGS))
        assert {(one.source.workers, one.target.workers) for one in some} == set(product(range(1, 5), range(1, 5)))
        assert {(one.source.group, one.target.group) for one in some} == set(
            product(("shared-memory", "distributed"), ("shared-memory", "distributed"))
        )
