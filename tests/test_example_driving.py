"""The driving example: CarRacing's pictures as records, imitation, and scores on tracks that are new to the network."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import manyhands as mh
from support.threads import run_threads
from support.training import train_with_engine

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "driving"
MODULES = ("car", "network", "episodes", "learning", "driving", "pictures")
HOW: dict[str, Any] = {"progress": False, "memory": "1GiB"}

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("gymnasium", "Box2D", "pygame")),
        reason="the driving example needs manyhands[driving]",
    ),
    pytest.mark.filterwarnings("ignore:builtin type .*Swig.*:DeprecationWarning"),  # Box2D, with Python 3.12 and newer
]


@pytest.fixture
def driving(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example's main module. Its modules are imported under their own names, so that workers can import them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("driving")
    for name in MODULES:
        sys.modules.pop(name, None)


def observations(driving: ModuleType, episodes: list[int]) -> list[list[Any]]:
    """The bits of the observations of the first actions of some episodes, gathered one after the other."""
    job = driving.episodes_of(episodes).flat_map(driving.Gathering(actions=12))
    found = job.take(10**6, workers=0, **HOW)
    return [[np.asarray(value).tobytes().hex() for value in observation.values()] for observation in found]


def test_an_episode_is_the_same_after_others_as_in_a_new_process(driving: ModuleType) -> None:
    mixed = observations(driving, [3, 1, 3, 3])
    first, other, *again = (mixed[start : start + 12] for start in range(0, len(mixed), 12))
    script = "import json, driving, test_example_driving as t; print(json.dumps(t.observations(driving, [3])))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(Path(__file__).parent), *sys.path])}
    new = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert [first, *again] == [json.loads(new.stdout.splitlines()[-1])] * 3
    assert all(picture not in {observation[2] for observation in first} for picture in (each[2] for each in other))


def test_the_camera_and_the_score_are_those_of_the_environment(driving: ModuleType) -> None:
    gymnasium, car = importlib.import_module("gymnasium"), importlib.import_module("car")
    own, theirs, total = car.Car(), gymnasium.make("CarRacing-v3"), 0.0
    assert theirs.spec.max_episode_steps == car.MOST_FRAMES
    own.start(4)
    frame, _ = theirs.reset(seed=4)
    for steering, pedal in ((0.0, 1.0), (0.3, 1.0), (-0.5, 0.5), (0.2, -0.4)):
        assert np.array_equal(own.env.frame()[:84], frame[:84])  # below, theirs has the score from before the step
        own.act(steering, pedal)
        for _ in range(car.HOLD):
            action = np.array([steering, max(pedal, 0), max(-pedal, 0)], dtype=np.float32)
            frame, reward, *_ = theirs.step(action)
            total += float(reward)
    assert own.score == total
    # A pixel of ours is the mean of four of theirs, in grey, with weights in 1/256 and rounded down.
    grey = frame[:84].astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(own.picture() - grey.reshape(42, 2, 48, 2).mean(axis=(1, 3))).max() <= 1.5


def test_the_expert_completes_a_lap_and_points_are_those_of_the_rules(driving: ModuleType) -> None:
    (trial,) = driving.episodes_of([5001]).map(driving.Trial()).take(1, workers=0, **HOW)
    assert trial["lap"]
    assert trial["frames"] < 800
    assert trial["score"] == pytest.approx(1000 - trial["frames"] / 10)  # each tile was visited
    assert 0 < trial["mean_offset"] < 1.5
    assert trial["off_road"] == 0


def test_distances_are_measured_from_the_middle_line(driving: ModuleType) -> None:
    car = importlib.import_module("car")
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = car.Track.of(100 * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert circle.curvatures == pytest.approx(np.full(400, 0.01), rel=1e-3)
    for tile, distance in itertools.product((0, 1, 250, 399), (-6.0, 0.0, 4.5)):
        place = (100 - distance) * np.array([np.cos(angles[tile] + 0.004), np.sin(angles[tile] + 0.004)])
        assert circle.nearest(place, (tile - 3) % 400) == tile
        assert circle.offset(place, tile) == pytest.approx(distance, abs=0.01)  # driven to the left, inside is positive


def test_black_pictures_end_the_job(driving: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("car").Camera, "frame", lambda self: np.zeros((96, 96, 3), np.uint8))
    job = driving.episodes_of([0]).flat_map(driving.Gathering(actions=2))
    with pytest.raises(mh.DataError, match="blank"):
        job.write(tmp_path / "out", format="arrays", workers=0, **HOW)
    assert not (tmp_path / "out" / "_manifest.json").exists()


def test_a_driver_is_not_judged_on_tracks_that_it_has_learned_from(driving: ModuleType) -> None:
    driving.Settings(episodes=driving.FIRST_UNSEEN - 8)
    with pytest.raises(mh.ConfigError, match="judged on tracks that it has learned from"):
        driving.Settings(episodes=driving.FIRST_UNSEEN - 7)


def test_data_are_divided_by_episode_and_mirrored_and_any_workers_learn_the_same(
    driving: ModuleType, tmp_path: Path
) -> None:
    learning = importlib.import_module("learning")
    job = driving.episodes_of([0, 1, 2]).flat_map(driving.Gathering(actions=8))
    gathered = job.write(tmp_path, format="arrays", workers=0, **HOW).path
    data, held_out = learning.divided([gathered], 2 / 3)
    rows = mh.ArrayFile(gathered)
    numbers = [
        {int(rows[part.first_row(i)]["episode"]) for i in range(len(part))}
        for each in (data, held_out)
        for part in each.dataset.datasets
    ]
    assert (len(data), len(held_out)) == (16, 8)
    assert len(numbers[0]) == 2
    assert numbers[0] | numbers[1] == {0, 1, 2}  # each episode is learned from or held out
    plain = learning.Observations(data.dataset.datasets)[5]
    seen = []
    for seed in range(8):
        torch.manual_seed(seed)
        seen.append(data[5])
    turned = [each for each in seen if not torch.equal(each["picture"], plain["picture"])]
    assert 0 < len(turned) < 8
    for each in turned:
        assert torch.equal(each["picture"].flip(1), plain["picture"])
        assert each["action"].tolist() == [-plain["action"][0], plain["action"][1]]
        assert each["motion"].tolist() == [plain["motion"][0], -plain["motion"][1]]
    recipe = learning.recipe(data, held_out, steps=2)
    (expected,) = run_threads(1, lambda group: train_with_engine(recipe, mh.Strategy(), steps=2, group=group))
    found = run_threads(3, lambda group: train_with_engine(recipe, mh.Strategy(), steps=2, group=group))
    assert [outcome.digest for outcome in found] == [expected.digest] * 3


def test_a_result_of_another_environment_is_named_and_not_compared(driving: ModuleType) -> None:
    scores = {"mean": 912.3, "deviation": 4.0, "lowest": 901.0, "laps": 3, "tracks": 3, "mean_offset": 0.5}
    here = driving.environment()
    assert set(here) == {"gymnasium", "source", "Box2D", "pygame"}
    assert "912.3" in driving.compared(here, {"environment": here, "network": scores}, "recorded")
    for change in ({"source": "b" * 64}, {"gymnasium": "0.0.1"}, {"more": "1"}):
        named = driving.compared(here, {"environment": {**here, **change}, "network": scores}, "recorded")
        assert next(iter(change.values()))[:12] in named
        assert "912" not in named
    assert (
        driving.compared(here, {"environment": here, "network": scores, "network_pushed": scores}, "x").count("912")
        == 2
    )
    job = driving.episodes_of([0]).map(driving.Trial())
    other = driving.episodes_of([0]).map(driving.Trial(environment={**here, "source": "b" * 64}))
    assert job.identity != other.identity


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(FOLDER / "driving.py"), "--out", str(out), "--no-pictures", *options]


def bits_of(out: Path) -> list[Any]:
    """What must not depend on the workers: the digests of all that was gathered, of the weights, and of the scores."""
    result = json.loads((out / "result.json").read_text())
    return [
        result["gathered"],
        result["weights"],
        result["environment"],
        *(result[f"{who}{how}"] for who in ("network", "expert") for how in ("", "_pushed")),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_stages_have_the_same_bits_with_1_2_and_3_workers_and_after_kills(tmp_path: Path) -> None:
    sizes = {"episodes": 3, "held-out": 1, "steps": 40, "tracks": 2, "rounds": 1, "round-episodes": 2}
    small = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    found = []
    for workers in ("1", "2", "3"):
        out = tmp_path / workers
        subprocess.run(command(out, *small, "--workers", workers), check=True, capture_output=True, timeout=900)
        found.append(bits_of(out))
    assert found[0] == found[1] == found[2]
    out, kills = tmp_path / "killed", 0
    for milestone in ("gathered/.manyhands", "gathered/_manifest.json", "training", "round-1", "driven/network"):
        process = subprocess.Popen(
            command(out, *small, "--workers", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and not (out / milestone).exists():
            time.sleep(0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    subprocess.run(command(out, *small, "--workers", "2"), check=True, capture_output=True, timeout=900)
    assert bits_of(out) == found[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_network_solves_100_unseen_tracks(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--tracks", "100", "--workers", "2"), check=True, capture_output=True, text=True
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["network"]["tracks"] == 100
    assert result["network"]["mean"] >= 900, done.stdout
    assert result["network"]["lowest"] >= 700, done.stdout
    assert result["expert"]["mean"] >= 910
