"""The weather example: the model against a known truth, the scores, and the bits of all stages."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import manyhands as mh

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "weather"
MODULES = ("sphere", "qg", "emulator", "scores", "world", "verification", "weather", "exchange", "pictures")
SMALL = {
    "trajectories": 4,
    "days": 12,
    "spin_up": 2,
    "held_out": 1,
    "tested": 1,
    "steps": 2,
    "rollout_steps": 1,
    "leads": 4,
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the example under their own names, so that workers can import them, too."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    names = [name for name in MODULES if name not in ("exchange", "pictures")]
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_rossby_haurwitz_wave_matches_the_closed_form(example: SimpleNamespace) -> None:
    assert example.qg.rossby_haurwitz_error() < 1e-8
    assert example.qg.rossby_haurwitz_error(days=1, step_seconds=14400) > 1e-8  # so the error is not always small


def test_transforms_and_derivatives_are_exact(example: SimpleNamespace) -> None:
    grid = example.sphere.sphere()
    draws = np.random.default_rng(0).standard_normal((2, 22, 22, 3))
    spectral = (draws[0] + 1j * draws[1]) * grid.inside
    spectral[0].imag = 0
    assert np.abs(grid.to_spectral(grid.to_grid(spectral)) - spectral).max() < 1e-13
    longitudes, mu = grid.longitudes[:, None, None], grid.mu[None, :, None]
    field = (1 - mu**2) * mu * np.cos(2 * longitudes)
    along, across = grid.derivatives(grid.to_spectral(field))
    assert np.abs(along + 2 * (1 - mu**2) * mu * np.sin(2 * longitudes)).max() < 1e-13
    assert np.abs(across - (1 - mu**2) * (1 - 3 * mu**2) * np.cos(2 * longitudes)).max() < 1e-13


def test_a_trajectory_depends_on_its_number_and_the_seed_alone(example: SimpleNamespace) -> None:
    nature = example.world.Nature(days=1, seed=0, spin_up=2)
    first, again = list(nature(3)), list(nature(3))
    assert [record["step"] for record in first] == [0, 1]
    assert all(a["state"].tobytes() == b["state"].tobytes() for a, b in zip(first, again, strict=True))
    states = {
        next(iter(made(number)))["state"].tobytes()
        for made, number in ((nature, 3), (nature, 4), (example.world.Nature(days=1, seed=1, spin_up=2), 3))
    }
    assert len(states) == 3


def test_short_steps_change_the_model_s_heights_by_less_than_a_metre(example: SimpleNamespace) -> None:
    """The Adams-Bashforth scheme against Runge-Kutta with a quarter of its step, over a day of developed weather."""
    qg = example.qg
    model, seconds = qg.atmosphere(), qg.STEP_SECONDS
    start = model.start([np.random.Generator(np.random.Philox(key=[0, 0]))])
    weather = next(islice(qg.adams_bashforth(model.tendency, start, seconds), 24 * 20 - 1, None))
    found = next(islice(qg.adams_bashforth(model.tendency, weather, seconds), 23, None))
    exact = next(islice(qg.runge_kutta(model.tendency, weather, seconds / 4), 95, None))
    change, error = (
        model.grid.to_grid(model.stream(other - exact))[..., 1] * qg.HEIGHT_FACTOR * model.grid.mu
        for other in (weather, found)
    )
    assert np.sqrt(np.square(change).mean()) > 20
    assert np.sqrt(np.square(error).mean()) < 1


def test_weights_are_differences_of_sines(example: SimpleNamespace) -> None:
    assert example.sphere.latitude_weights([-60, 0, 60]).tolist() == pytest.approx([0.75, 1.5, 0.75])
    weights = example.sphere.latitude_weights(np.degrees(example.sphere.sphere().latitudes))
    assert weights.mean() == pytest.approx(1)
    assert np.abs(weights - example.sphere.latitude_weights(-np.degrees(example.sphere.sphere().latitudes))).max() == 0


def test_scores_do_not_change_when_latitude_is_reversed_or_longitude_rolled(example: SimpleNamespace) -> None:
    latitudes = np.array([-70.0, -30, 10, 20, 60])
    forecast, truth = np.random.default_rng(1).standard_normal((2, 4, 5, 8))
    normal = np.random.default_rng(2).standard_normal((5, 8))

    def scores(turn: Any, degrees: Any) -> list[Any]:
        weights, fields = example.sphere.latitude_weights(degrees), [turn(each) for each in (forecast, truth, normal)]
        error = example.scores.squared_error(*fields[:2], weights)
        return [error, example.scores.anomaly_correlation(*fields, weights)]

    plain = scores(lambda field: field, latitudes)
    for turn, degrees in (
        (lambda field: field[..., ::-1, :], latitudes[::-1]),
        (lambda field: np.roll(field, 3, axis=-1), latitudes),
    ):
        assert np.allclose(scores(turn, degrees), plain, rtol=1e-13)
    wrong = scores(lambda field: field[..., ::-1, :], latitudes)  # fields and latitudes don't fit
    assert not np.allclose(wrong, plain, rtol=1e-3)


def test_scores_of_forecasts_whose_scores_are_known(example: SimpleNamespace) -> None:
    weights, normal = np.array([0.5, 1.5]), np.zeros((2, 4))
    truth = np.random.default_rng(3).standard_normal((2, 4))
    correlation = example.scores.anomaly_correlation
    assert [float(correlation(k * truth, truth, normal, weights)) for k in (1, 2, -1, 0)] == pytest.approx(
        [1, 1, -1, 0]
    )
    assert float(example.scores.squared_error(truth + np.array([[2], [4]]), truth, weights)) == pytest.approx(13)


def test_the_linear_model_finds_a_linear_law(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example.scores, "RIDGE", 1e-9)
    grid = example.sphere.sphere()
    draws = np.random.default_rng(4).standard_normal((2, 22, 22, 12))
    spectral = (draws[0] + 1j * draws[1]) * grid.inside
    spectral[0].imag = 0
    first = grid.to_grid(spectral).transpose(2, 1, 0).reshape(4, 3, 32, 64)
    pairs = [np.stack([state, 0.5 * np.roll(state, 2, axis=-1)]) for state in first]  # half as high, and to the east
    matrix = example.scores.fit_linear(pairs)
    mixed = np.stack([first[0] - first[2], 0.3 * first[1] + first[3]])
    (found,) = example.scores.linear_forecasts(matrix, mixed, 1)
    assert np.abs(found - 0.5 * np.roll(mixed, 2, axis=-1)).max() < 1e-4


def test_the_emulator_is_periodic_and_begins_as_persistence(example: SimpleNamespace) -> None:
    emulator = example.emulator
    network = emulator.Emulator(np.zeros((3, 32, 64)), np.ones(3), np.linspace(-85, 85, 32), np.ones(32))
    assert sum(param.numel() for param in network.parameters()) == 127_412
    states = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(states), states)
    torch.nn.init.normal_(network.leave.weight, generator=torch.Generator().manual_seed(1))
    rolled = network(states.roll(2, dims=-1))
    assert (rolled - network(states).roll(2, dims=-1)).abs().max() < 1e-4
    assert emulator.loss(network, torch.stack([states, states], dim=1)) > 0


def small(example: SimpleNamespace, out: Path, workers: int) -> Any:
    settings = example.weather.Settings(**SMALL)
    return example.weather.run(settings, str(out), workers)


def test_all_stages_run_and_count_the_starts_that_are_left_out(example: SimpleNamespace, tmp_path: Path) -> None:
    verified = small(example, tmp_path, 1)
    table = verified.table
    assert (table.starts, table.left_out) == (5, 1)  # 24 states, starts 0, 4, ..., 20; the truth of 20 ends too early
    world = verified.world
    # The scores of one forecast, computed again by hand.
    network = example.verification.trained(world, verified.models.run)
    states, mean = world.states(3), network.mean.numpy()
    *_, forecast = example.emulator.forecasts(network, states[[0, 4, 8, 12, 16]], 4)
    area = np.cos(np.radians(world.latitudes))
    error = (area[:, None] * (world.heights(forecast[1]) - world.heights(states[8])) ** 2).mean() / area.mean()
    assert table.values["mse"][0][1, 3, 0] == pytest.approx(error, rel=0.01)
    climatology = np.concatenate([world.states(number) for number in (0, 1)]).mean(axis=0, dtype=np.float64)
    assert np.abs(climatology - mean).max() < 1e-5  # of the training trajectories alone


@pytest.mark.slow
def test_all_stages_have_the_same_bits_with_1_2_and_3_workers_and_after_kills(
    example: SimpleNamespace, tmp_path: Path
) -> None:
    found = [small(example, tmp_path / str(workers), workers).digests for workers in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    killed, kills = tmp_path / "killed", 0
    command = [sys.executable, str(EXAMPLE / "weather.py"), "--out", str(killed), "--workers", "2"]
    command += [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(mh.__file__).parents[1]), *sys.path])}
    for milestone in ("nature/*", "nature/_manifest.json", "training/**/metrics.jsonl", "scores/*"):
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None and not list(killed.glob(milestone)):
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()  # alone at first: its workers end when it is gone
        process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert kills >= 3
    assert small(example, killed, 2).digests == found[0]


@pytest.mark.slow
def test_a_thread_count_of_blas_does_not_change_a_trajectory() -> None:
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); from world import Nature\n"
        "print(hashlib.sha256(b''.join(r['state'].tobytes() for r in Nature(2, 0, 2)(0))).hexdigest())"
    )
    found = set()
    for threads in ("1", "2", "4"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code, str(EXAMPLE)]
        found.add(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
    assert len(found) == 1


@pytest.mark.slow
def test_a_picture_is_drawn(example: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    verified = small(example, tmp_path, 1)
    example.weather.draw(verified, str(tmp_path / "weather.png"), example.qg.heights().T)
    assert (tmp_path / "weather.png").stat().st_size > 50_000


# Zarr


def era5_store(path: Path, *, southward: bool = False) -> None:
    """Write a small store in WeatherBench 2's layout, every 6 hours in each of four years."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("zarr")
    days = [np.datetime64(f"{year}-01-01T00") + np.arange(48) * np.timedelta64(6, "h") for year in range(2000, 2004)]
    times = np.concatenate(days).astype("datetime64[ns]")
    latitudes = np.linspace(-87.1875, 87.1875, 32)
    values = 9.80665 * (5500 + 100 * np.random.default_rng(0).standard_normal((len(times), 4, 64, 32)).astype("f4"))
    values[:, 2] = 9.80665 * (latitudes + np.arange(len(times))[:, None, None])  # the level 500 hPa is known
    order = slice(None, None, -1) if southward else slice(None)
    xarray.Dataset(
        {"geopotential": (("time", "level", "longitude", "latitude"), values[..., order])},
        {
            "time": times,
            "level": [100, 200, 500, 850],
            "longitude": np.arange(64) * 5.625,
            "latitude": latitudes[order],
        },
    ).to_zarr(path, zarr_format=2)


@pytest.mark.parametrize("southward", [False, True])
def test_a_store_in_weatherbench_2_s_layout_is_read(example: SimpleNamespace, tmp_path: Path, southward: bool) -> None:
    era5_store(tmp_path / "era5.zarr", southward=southward)
    exchange = importlib.import_module("exchange")
    world = exchange.era5(str(tmp_path / "era5.zarr"), str(tmp_path / "world"), held_out=1, tested=1, workers=0)
    assert world.parts() == (range(2), range(2, 3), range(3, 4))  # years
    states = world.states(0)
    assert states.shape == (24, 3, 32, 64)  # every 12 hours
    expected = np.array(world.latitudes)[:, None] + np.arange(0, 48, 2)[:, None, None]
    assert np.abs(world.heights(states) - expected).max() < 1e-4
    assert world.times(3)[0] == np.datetime64("2003-01-01T00")


@pytest.mark.slow
def test_forecasts_are_written_in_weatherbench_2_s_layout(example: SimpleNamespace, tmp_path: Path) -> None:
    era5_store(tmp_path / "era5.zarr")
    xarray, exchange = importlib.import_module("xarray"), importlib.import_module("exchange")
    settings = example.weather.Settings(**SMALL)
    verified = example.weather.run(settings, str(tmp_path), 1, str(tmp_path / "era5.zarr"))
    exchange.write_forecasts(verified.world, verified.models, str(tmp_path), every=4, steps=4, workers=0)
    found = xarray.open_zarr(tmp_path / "forecasts.zarr", decode_timedelta=True)
    assert found.geopotential.dims == ("time", "prediction_timedelta", "latitude", "longitude")
    assert found.geopotential.shape == (6, 4, 32, 64)
    assert found.time.values[1] == np.datetime64("2003-01-03T00")
    network = example.verification.trained(verified.world, verified.models.run)
    *_, last = example.emulator.forecasts(network, verified.world.states(3)[range(0, 24, 4)], 4)
    assert np.abs(found.geopotential[:, 3] / 9.80665 - verified.world.heights(last)).max() < 0.1
