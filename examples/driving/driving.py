"""A network learns from an expert to drive a car by camera, and is judged on tracks that it has never seen.

    python examples/driving/driving.py --workers 2                          # all stages; 20 tracks
    python examples/driving/driving.py --workers 2 --tracks 100             # as the environment defines "solved"
    python examples/driving/driving.py --noise 0 --out runs/without-noise   # what happens without noise
    python examples/driving/driving.py --rounds 1                           # with a round of DAgger

The stages gather (a data job), train (a run) and drive (a data job). Each stage has the same bits with any number of
workers. If a stage is killed, the same command resumes it. Complete stages are not repeated. The output folder holds:

    gathered/        pictures, motion and the expert's actions, by episode; with --rounds also round-1/, ...
    training/KEY/    the run that trained on them; KEY depends on the gathered data and the settings
    driven/          the score on each track: network/ and expert/
    result.json      scores, digests, and the versions of the environment
    driving.png, driving.webp

Needs: pip install 'manyhands[driving,plot]'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import manyhands as mh

sys.path.insert(0, str(Path(__file__).resolve().parent))
from car import environment
from episodes import NOISE, Gathering, Pushes, Trial
from learning import BATCH, STEPS, load_driver, train_on
from network import Driver

FIRST_UNSEEN = 9000
"""The episodes that a driver is judged on begin here; those that it learns from begin at 0."""
TARGET_MEAN, TARGET_LOWEST = 900, 700
BASELINE = "a public baseline, a network of 191 k parameters: mean 914 ± 43, lowest 699 (CarRacing-v2, 100 tracks)"
"""Of github.com/LongHoangNguyen06/Imitation-Learning-OpenAI-Gym-Car-Race"""
DRIVES = {"network": "", "network_pushed": ", pushed"}
"""What a network drives. Pushed: with noise on its steering, to see whether it comes back to the road."""
RECORDED = Path(__file__).resolve().parent / "recorded.json"
"""Results on 100 tracks, by name, with the environment that they are of."""


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    episodes: to learn from; held_out: further ones, on which the loss is validated. rounds: of DAgger, each with
    `round_episodes` further episodes. tracks: to judge the driver on.
    """

    episodes: int = 80
    held_out: int = 8
    noise: float = NOISE
    steps: int = STEPS
    rounds: int = 0
    round_episodes: int = 40
    tracks: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"episodes": 1, "held_out": 1, "noise": 0, "steps": 1, "rounds": 0, "round_episodes": 1, "tracks": 1}
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise mh.ConfigError(f"{name} is too small", expected=f"at least {smallest}", got=getattr(self, name))
        learned = self.gathered + self.rounds * self.round_episodes
        if learned > FIRST_UNSEEN:
            raise mh.ConfigError(
                "the driver would be judged on tracks that it has learned from",
                expected=f"at most {FIRST_UNSEEN} episodes to learn from",
                got=learned,
            )

    @property
    def gathered(self) -> int:
        """The number of episodes that the expert drives."""
        return self.episodes + self.held_out


def write(job: mh.Dataset, folder: str, kind: str, **how: Any) -> mh.PrepareSummary:
    """Run a job, or return at once if its output is complete. A changed job replaces its output."""
    return job.write(folder, format=kind, overwrite=True, **how)


def episodes_of(numbers: list[int]) -> mh.Dataset:
    """One task for each episode."""
    return mh.Dataset.from_records(numbers, partition_bytes=1)


def gather(
    settings: Settings, out: str, driver: Driver | None = None, number: int = 0, **how: Any
) -> mh.PrepareSummary:
    """Gather the observations of all episodes, or of a round of DAgger, in which `driver` drives."""
    if driver is None:
        job = episodes_of(list(range(settings.gathered))).flat_map(Gathering(Pushes(settings.noise)))
        return write(job, os.path.join(out, "gathered"), "arrays", **how)
    first = settings.gathered + (number - 1) * settings.round_episodes
    job = episodes_of(list(range(first, first + settings.round_episodes))).flat_map(Gathering(Pushes(), driver=driver))
    return write(job, os.path.join(out, f"round-{number}"), "arrays", **how)


def train(settings: Settings, out: str, gathered: list[mh.PrepareSummary], workers: int) -> str:
    """Train on what was gathered, and return the run directory. It is new for other data or settings."""
    share = settings.episodes / settings.gathered
    facts = [*(summary.digest for summary in gathered), share, settings.steps, settings.seed]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    run = os.path.join(out, "training", key)
    folders = [summary.path for summary in gathered]
    workers = min(workers, BATCH.micro_batches)
    mh.launch(train_on, folders, share, settings.steps, settings.seed, run, workers=workers)
    return run


def drive(settings: Settings, out: str, driver: Driver | None, **how: Any) -> dict[str, Any]:
    """Drive on tracks that no driver has learned from, undisturbed and pushed, and return the scores by name.

    driver: None for the expert.
    """
    tracks = episodes_of(list(range(FIRST_UNSEEN, FIRST_UNSEEN + settings.tracks)))
    name, scores = "expert" if driver is None else "network", {}
    for suffix, pushes in (("", Pushes()), ("_pushed", Pushes(NOISE))):
        folder = os.path.join(out, "driven", name + suffix)
        scores[name + suffix] = scores_of(write(tracks.map(Trial(driver, pushes)), folder, "jsonl", **how))
    return scores


def scores_of(driven: mh.PrepareSummary) -> dict[str, Any]:
    """Summarize the trials of a driver: points, laps, and metres from the middle of the road."""
    trials = [json.loads(line) for name in driven.files for line in Path(driven.path, name).read_text().splitlines()]
    scores = [trial["score"] for trial in trials]
    return {
        "tracks": len(trials),
        "mean": statistics.fmean(scores),
        "deviation": statistics.pstdev(scores),
        "lowest": min(scores),
        "laps": sum(trial["lap"] for trial in trials),
        "mean_offset": statistics.fmean(trial["mean_offset"] for trial in trials),
        "largest_offset": max(trial["largest_offset"] for trial in trials),
        "digest": driven.digest,
    }


def described(name: str, scores: dict[str, Any]) -> str:
    """One line about the scores of a driver."""
    return (
        f"{name:<32} mean {scores['mean']:6.1f} ± {scores['deviation']:5.1f}, lowest {scores['lowest']:6.1f}, "
        f"laps {scores['laps']}/{scores['tracks']}, {scores['mean_offset']:.2f} m from the middle"
    )


def compared(environment: dict[str, str], other: dict[str, Any], name: str) -> str:
    """Return the scores of another result in lines. If it is of another environment, name that one instead."""
    differ = [
        key
        for key in sorted({*environment, *other["environment"]})
        if environment.get(key) != other["environment"].get(key)
    ]
    if not differ:
        return "\n".join(described(f"{name}{label}", other[key]) for key, label in DRIVES.items() if key in other)
    theirs, ours = (
        ", ".join(f"{key} {found.get(key, 'none')[:12]}" for key in differ)
        for found in (other["environment"], environment)
    )
    return f"{name}: not compared, because it is of another environment: {theirs}; here: {ours}"


def report(result: dict[str, Any], beside: dict[str, Any]) -> None:
    """Print the scores beside the targets, and beside other results by name."""
    network = result["network"]
    for key, label in DRIVES.items():
        print(described(f"network{label}", result[key]))
        print(described(f"expert{label}", result[key.replace("network", "expert")]))
    for name, other in beside.items():
        print(compared(result["environment"], other, name))
    for name, target in (("mean", TARGET_MEAN), ("lowest", TARGET_LOWEST)):
        print(f"{name} {network[name]:.1f}, target {target}: {'reached' if network[name] >= target else 'missed'}")
    print(BASELINE)
    print("environment: " + ", ".join(f"{key} {value[:12]}" for key, value in result["environment"].items()))
    gathered = ", ".join(digest[:12] for digest in result["gathered"])
    print(f"digests: gathered {gathered}; weights {result['weights'][:12]}; scores {network['digest'][:12]}")


def run(settings: Settings, out: str, workers: int | None) -> dict[str, Any]:
    """Run all stages, and return the result, which is also in `result.json`."""
    workers = workers or os.cpu_count() or 1
    how = {"workers": workers}
    gathered = [gather(settings, out, **how)]
    trained = train(settings, out, gathered, workers)
    for number in range(1, settings.rounds + 1):
        gathered.append(gather(settings, out, load_driver(trained), number, **how))
        trained = train(settings, out, gathered, workers)
    driver = load_driver(trained)
    return {
        "environment": environment(),
        "settings": vars(settings),
        "gathered": [summary.digest for summary in gathered],
        "weights": driver.digest,
        "run": os.path.relpath(trained, out),
        **drive(settings, out, driver, **how),
        **drive(settings, out, None, **how),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/driving")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one for each CPU)")
    parser.add_argument("--no-pictures", action="store_true", help="draw no pictures")
    parser.add_argument("--beside", nargs="*", default=[], help="result.json of other runs, to print beside this one")
    for name, default in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    try:
        settings = Settings(**{name: getattr(options, name) for name in vars(Settings())})
        result = run(settings, options.out, options.workers)
        Path(options.out, "result.json").write_text(json.dumps(result, indent=1) + "\n")
        report(result, {**json.loads(RECORDED.read_text()), **results_in(options.beside)})
        if not options.no_pictures:
            draw(options.out, load_driver(os.path.join(options.out, result["run"])))
    except mh.ManyhandsError as error:
        parser.exit(1, f"{error}\n")


def results_in(paths: list[str]) -> dict[str, Any]:
    """Read the results of other runs, as far as there are any."""
    return {path: json.loads(Path(path).read_text()) for path in paths if Path(path).exists()}


def draw(out: str, driver: Driver) -> None:
    """Draw a drive on the first unseen track."""
    try:
        import pictures
    except ImportError:
        print("no pictures were drawn, because matplotlib is not installed: pip install matplotlib")
        return
    drive = pictures.Drive.of(driver, FIRST_UNSEEN)
    pictures.draw(drive, os.path.join(out, "driving.png"))
    pictures.animate(drive, os.path.join(out, "driving.webp"))


if __name__ == "__main__":
    main()
