"""Runs with islands have one digest, whoever computes the islands, and whatever fails."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.doctor.islands import described, islands_report
from support.island_runs import CASES, STEPS, digest_of, digests_of_cases, muon_and_adamw, of_clusters, recipe


@cache
def expected(case: str) -> str:
    """The digest of one process."""
    return digest_of(CASES[case])


def test_one_island_that_averages_after_every_step_is_a_plain_run() -> None:
    assert digest_of({"count": 1, "every": 1, "bits": 32, "outer": "averaging"}) == digest_of(None)


@pytest.mark.parametrize("sharding", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_workers_and_sharding_change_no_bit(sharding: str) -> None:
    alone = {name: expected(name) for name, case in CASES.items() if "warm_steps" not in case}
    assert mh.launch(digests_of_cases, sharding, workers=2) == [alone] * 2


@pytest.mark.parametrize("case", ["momentum and delay", pytest.param("two bits, reset", marks=pytest.mark.slow)])
def test_clusters_change_no_bit(case: str, tmp_path: Path) -> None:
    found = of_clusters(
        tmp_path,
        CASES[case],
        {"islands": [0, 2], "workers": 2, "sharding": "zero3"},
        {"islands": [1], "sharding": "ddp"},
    )
    assert found == [expected(case)] * 2


def test_parameters_that_are_not_split(tmp_path: Path) -> None:
    islands = {"count": 2, "every": 4, "outer": "nesterov", "momentum_from": 0}
    changes = {"optimizer": muon_and_adamw, "precision": "bf16"}
    alone = digest_of(islands, changes=changes)
    found = mh.launch(digest_of, islands, sharding="zero3", changes=changes, workers=2)
    assert found == [alone] * 2


def test_warm_steps_are_a_plain_run_and_the_others_join(tmp_path: Path) -> None:
    islands = CASES["warm steps"]
    alone = digest_of(islands, tmp_path / "alone")
    plain = mh.train(
        recipe(None, batch=mh.Batch(global_size=16, micro_size=4)),
        steps=islands["warm_steps"],
        run_dir=tmp_path / "plain",
        show=False,
    )
    warm = tmp_path / "alone" / "islands" / "warm" / "events.jsonl"
    assert plain.digest in warm.read_text()
    found = of_clusters(tmp_path, islands, {"islands": [0]}, {"islands": [1], "workers": 2})
    assert found == [alone] * 2


def test_a_run_that_was_killed_right_after_the_warm_steps_continues(tmp_path: Path) -> None:
    warm, run = CASES["warm steps"], tmp_path / "run"
    held_out = mh.Validation(data=recipe(None).data, samples=8, at_start=True, every="100 steps")
    options = {"changes": {"validation": held_out}, "keep_best": "validation.loss:min"}
    alone = digest_of(warm, run, **options)
    # At that moment, there are the run of the warm steps and the checkpoint before step 1.
    for path in [*run.glob("islands/[!w]*"), *run.glob("checkpoints/step-*[1-9]*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000000"]
    assert digest_of(warm, run, **options) == alone


def test_clusters_share_islands_and_take_over_those_of_a_lost_one(tmp_path: Path) -> None:
    case, steps = "momentum and delay", 34
    store = str(tmp_path / "store")
    alone = digest_of(CASES[case], steps=steps)
    command = [
        sys.executable,
        "-c",
        "import support.island_runs as r, sys; r.digest_of(r.CASES[sys.argv[1]], "
        f"sys.argv[2], steps={steps}, islands_at=sys.argv[3])",
        case,
        str(tmp_path / "lost"),
        store,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as lost:
        while not list(Path(store).glob("rounds/*/island-0.safetensors")):
            assert lost.poll() is None
            time.sleep(0.01)
        lost.send_signal(signal.SIGKILL)
    # The cluster is lost in the middle of the run. Another one waits until its lease has run out, and continues.
    found = mh.launch(digest_of, CASES[case], tmp_path / "other", steps=steps, islands_at=store, workers=2)
    assert found == [alone] * 2
    assert digest_of(CASES[case], tmp_path / "lost", steps=steps, islands_at=store) == alone


@pytest.mark.parametrize("case", ["momentum and delay", pytest.param("warm steps", marks=pytest.mark.slow)])
def test_a_killed_run_continues_to_the_same_bits(case: str, tmp_path: Path) -> None:
    alone = digest_of(CASES[case], tmp_path / "alone")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "support.island_runs", case, str(tmp_path / "killed")]
    at_rest = tmp_path / "killed" / "islands" / "at-rest"
    for rests in (1, 3):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
            while run.poll() is None and len(list(at_rest.glob("*/step-*/manifest.json"))) < min(rests, 2):
                time.sleep(0.005)
            run.kill()
    assert digest_of(CASES[case], tmp_path / "killed") == alone
    left = {path.name for path in (tmp_path / "killed" / "islands").iterdir()}
    assert left <= {"place", "rounds", "warm"}, "a complete run needs no states"
    assert digest_of(CASES[case], tmp_path / "killed") == alone
    leftovers = [path for path in (tmp_path / "killed").rglob("*") if path.name.endswith((".tmp", ".partial"))]
    assert not leftovers


def test_a_stopped_cluster_repeats_the_round(tmp_path: Path) -> None:
    islands = CASES["momentum and delay"]

    class Stop(mh.Listener):
        def step(self, metrics: mh.StepMetrics, workers: object) -> Any:
            return mh.stop("enough") if metrics.step == 6 else None

    with pytest.raises(mh.Interrupted, match=r"of island .: enough"):
        digest_of(islands, tmp_path / "run", listeners=[Stop()])
    assert digest_of(islands, tmp_path / "run") == expected("momentum and delay")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    recorded = sorted((each["island"], each["step"]) for each in steps)
    assert recorded == [(island, step) for island in range(3) for step in range(1, STEPS + 1)]


def test_another_recipe_at_the_same_place_is_refused(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    islands = {"count": 1, "every": 5}
    digest_of(islands, tmp_path / "one", islands_at=store)
    with pytest.raises(mh.ConfigError, match="recipe"):
        digest_of(islands | {"bits": 8}, tmp_path / "two", islands_at=store)
    with pytest.raises(mh.ConfigError):
        digest_of(islands, tmp_path / "three", steps=STEPS + 5, islands_at=store)
    report = islands_report(Path(store), print, seconds=0)
    assert (report.round, report.is_complete) == (3, True)
    assert report.summary == "the run is complete: every island has published the last round, 3"
    assert [described(each) for each in report.islands] == [("0", "published", "step 10", "nobody")]


class Counting(nn.Module):
    """Has a buffer whose last value counts, and one whose values differ between islands."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 5)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The scores of five classes."""
        if self.training:
            self.seen.copy_((inputs.abs() * 1000).long()[0, :2])
            self.largest.copy_(inputs.max())
        scores: torch.Tensor = self.layer(inputs)
        return scores


def test_buffers_follow_their_rules(tmp_path: Path) -> None:
    islands = {"count": 2, "every": 4, "delay": 1}
    changes = {"model": Counting, "buffers": {"seen": "last", "largest": "last"}}
    alone = digest_of(islands, tmp_path / "alone", changes=changes)
    found = of_clusters(tmp_path, islands, {"islands": [0], "changes": changes}, {"islands": [1], "changes": changes})
    assert found == [alone] * 2


class Remembering(nn.Linear):
    """A module with a state of its own."""

    def get_extra_state(self) -> dict[str, int]:
        """Return a state."""
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take a state."""


def test_modules_with_a_state_of_their_own_are_refused() -> None:
    with pytest.raises(mh.ConfigError, match="islands don't support modules with a state of their own"):
        digest_of({"count": 2}, changes={"model": lambda: Remembering(10, 5)})


@pytest.mark.parametrize("bits", [4, 32])
def test_a_weight_that_is_not_finite_is_refused_by_name(bits: int) -> None:
    islands = {"count": 2, "every": 1, "bits": bits, "outer": "averaging"}
    with pytest.raises(mh.NumericsError, match=r"the change of '\S+' in a round is not finite") as error:
        digest_of(islands, changes={"optimizer": lambda params: torch.optim.SGD(params, lr=math.inf)}, steps=3)
    assert "island 0, round 1" in str(error.value.where)
