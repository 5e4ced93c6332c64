"""A network learns to forecast the weather of a simulated planet, and is verified as WeatherBench 2 does.

    python examples/weather/weather.py --workers 2                        # all stages, about ten minutes on two cores
    python examples/weather/weather.py --era5 FILE.zarr --out runs/era5   # on a file in WeatherBench 2's layout

Stages: check (a closed form), nature (a data job), train (two runs), verify (a data job). Each stage has the same bits
with any number of workers. If a stage is killed, the same command resumes it. Complete stages are not repeated. The
output folder holds:

    nature/          the states of all trajectories, as array files
    training/KEY/    the runs; KEY depends on the states and the settings
    scores/          the scores of each start, lead time and method
    forecasts.zarr   forecasts over (time, prediction_timedelta, latitude, longitude), with --forecasts
    result.json      scores and digests
    weather.png      the picture, if matplotlib is installed
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import manyhands as mh

sys.path.insert(0, str(Path(__file__).resolve().parent))
import qg
import verification
from emulator import BATCH, recipe
from verification import TARGETS, Table, Verified
from world import Nature, World, simulated

WAVE_ERROR = 1e-6


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    trajectories: all of them, of `days` days after `spin_up` days. held_out of them are for validation, and tested for
    scores. steps: of training with one-step forecasts. rollout_steps: then with two-step forecasts. start_every: steps
    between two starts of forecasts. leads: steps of a forecast.
    """

    trajectories: int = 36
    days: int = 160
    spin_up: int = 40
    held_out: int = 2
    tested: int = 6
    steps: int = 510
    rollout_steps: int = 340
    start_every: int = 4
    leads: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "seed" else 1
            if not getattr(self, field.name) >= least:
                raise mh.ConfigError(
                    f"{field.name} is too small", expected=f"at least {least}", got=getattr(self, field.name)
                )


def check() -> float:
    """Print and return the error of a Rossby-Haurwitz wave after five days. Raises InvariantError above 1e-6."""
    error = qg.rossby_haurwitz_error()
    print(f"check: Rossby-Haurwitz wave 4 after 5 days: relative error {error:.1e}, target below {WAVE_ERROR:.0e}")
    if not error < WAVE_ERROR:
        raise mh.InvariantError("the barotropic vorticity equation is wrong", expected=f"< {WAVE_ERROR}", got=error)
    return error


def train(settings: Settings, world: World, out: str, workers: int) -> list[str]:
    """Train the emulator in two stages, and return their run directories. They are new for other data or settings."""
    facts = [world.digest, world.held_out, world.tested, settings.steps, settings.rollout_steps, settings.seed]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    runs = [os.path.join(out, "training", key, stage) for stage in ("one-step", "two-steps")]
    workers = min(workers, BATCH.micro_batches)
    model = verification.new_emulator(world, *world.statistics())
    stages = [(2, settings.steps, None, runs[0]), (3, settings.rollout_steps, runs[0], runs[1])]
    for length, steps, start, run_dir in stages:
        arguments = (world, model, length, steps, start, settings.seed, run_dir)
        if workers == 1:
            train_stage(*arguments)
        else:
            mh.launch(train_stage, *arguments, workers=workers)
    return runs


def train_stage(world: World, model: Any, length: int, steps: int, start: str | None, seed: int, run_dir: str) -> None:
    """Train on windows of `length` states. Collective. start: the run whose weights are the initial ones."""
    training, validation, _ = world.parts()
    data, held_out = world.windows(training, length), world.windows(validation, length)
    used = recipe(model, data, held_out, steps=steps, start=start, seed=seed)
    strategy = mh.Strategy(sharding="zero2")
    mh.train(used, steps=steps, strategy=strategy, run_dir=run_dir, checkpoint_every="20s")


def report(table: Table) -> None:
    """Print the scores of 500 hPa beside the targets."""
    print(f"height of 500 hPa, {table.starts} forecasts; {table.left_out} starts left out: their truth ends too early")
    print(f"{'lead':>6}" + "".join(f"{name:>27}" for name in table.methods) + "  (RMSE in m / ACC [95 % interval])")
    for lead, hours in enumerate(table.hours):
        if hours in (12, 24) or hours % 24 == 0:
            cells = [table.cell(method, lead) for method in table.methods]
            print(f"{hours:>4} h" + "".join(f"{cell:>27}" for cell in cells))
    for hours, least in TARGETS.items():
        if hours in table.hours:
            found = table.mean("acc", "network", table.hours.index(hours))
            print(f"ACC at {hours} h: {found:.3f}, target {least}: {'reached' if found >= least else 'missed'}")
    better = table.better_than("linear")
    print(f"better than the linear model (ACC and RMSE) at {sum(better)} of {len(better)} lead times")


def staged(name: str, began: float) -> None:
    """Print how long a stage took."""
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def make_world(settings: Settings, out: str, workers: int, store: str | None) -> World:
    """Simulate a planet, or read a store of ERA5."""
    folder, parts = os.path.join(out, "nature"), {"held_out": settings.held_out, "tested": settings.tested}
    if store is not None:
        from exchange import era5

        return era5(store, folder, **parts, workers=workers)
    nature = Nature(settings.days, settings.seed, settings.spin_up)
    return simulated(folder, nature, trajectories=settings.trajectories, **parts, workers=workers)


def run(settings: Settings, out: str, workers: int | None = None, store: str | None = None) -> Verified:
    """Run all stages after the check, and return the verified forecasts. store: of ERA5, for a world of its years."""
    workers = workers or os.cpu_count() or 1
    began = time.monotonic()
    world = make_world(settings, out, workers, store)
    staged("nature", began)
    began = time.monotonic()
    runs = train(settings, world, out, workers)
    staged("train", began)
    began = time.monotonic()
    verified = verification.verify(
        world, runs[-1], out, every=settings.start_every, steps=settings.leads, workers=workers
    )
    staged("verify", began)
    return verified


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/weather")
    parser.add_argument("--era5", metavar="FILE.zarr", help="learn from this store in place of a simulated planet")
    parser.add_argument("--forecasts", action="store_true", help="also write the forecasts as forecasts.zarr")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one for each CPU)")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    options = parser.parse_args()
    try:
        settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
        error = check()
        verified = run(settings, options.out, options.workers, options.era5)
        report(verified.table)
        if options.forecasts:
            from exchange import write_forecasts

            how = {"every": settings.start_every, "steps": settings.leads, "workers": options.workers}
            written = write_forecasts(verified.world, verified.models, options.out, **how)
            verified.digests["forecasts"] = written.digest
        result = {"check": error, "settings": asdict(settings), **verified.facts()}
        Path(options.out, "result.json").write_text(json.dumps(result, indent=1) + "\n")
        print("digests: " + "; ".join(f"{name} {digest[:12]}" for name, digest in verified.digests.items()))
        draw(verified, os.path.join(options.out, "weather.png"), None if options.era5 else qg.heights().T)
    except mh.ManyhandsError as error:
        parser.exit(1, f"{error}\n")


def draw(verified: Verified, path: str, mountains: Any) -> None:
    """Draw the picture, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture was drawn, because matplotlib is not installed: pip install matplotlib")
        return
    import pictures

    pictures.draw(verified, path, mountains)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
