"""One training, started in every way: the same bits, and a complete run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manyhands.listeners.run_directory import RunDirectory
from support.shared_runs import folder_of_all_processes, made_once

SUPPORT = Path(__file__).resolve().parent / "support"
SCRIPT, RECIPE, STEPS = str(SUPPORT / "started.py"), str(SUPPORT / "started.toml"), 6
MANYHANDS = [sys.executable, "-m", "manyhands.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPTS = {
    "python": (1, [sys.executable, SCRIPT]),
    "manyhands run": (2, [*MANYHANDS, "run", "--workers", "2", SCRIPT]),
    "torchrun": (2, [*TORCHRUN, SCRIPT]),
}
THE_SAME = ("digest", "first_loss", "last_loss", "steps", "sample")
KEYS = (
    "digest steps loss workers sharding transport device samples_per_second step_seconds_median "
    "peak_memory_bytes_per_worker"
)


def output_of(command: list[str]) -> str:
    """Run a command that must succeed. Return its standard output."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def from_command_line(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], RunDirectory]:
    """The summary that `manyhands train` prints, and its run directory."""

    def make(folder: Path) -> None:
        out = output_of([*MANYHANDS, "train", RECIPE, "--workers", "2", "--run-dir", str(folder / "run"), "--json"])
        (folder / "printed").write_text(out.splitlines()[-1])

    folder = made_once(folder_of_all_processes(tmp_path_factory, "started") / "command", make)
    return json.loads((folder / "printed").read_text()), RunDirectory(folder / "run")


@pytest.mark.parametrize("way", SCRIPTS)
def test_a_script_gives_the_same_bits_and_every_worker_the_same_summary(
    way: str, tmp_path: Path, from_command_line: tuple[dict[str, Any], RunDirectory]
) -> None:
    workers, command = SCRIPTS[way]
    output_of([*command, str(tmp_path)])
    summaries = [json.loads((tmp_path / f"worker-{rank}.json").read_text()) for rank in range(workers)]
    printed = from_command_line[0]
    for summary in summaries:
        assert (summary["digest"], summary["last_loss"], summary["steps"]) == (
            printed["digest"],
            printed["loss"],
            STEPS,
        )
        assert summary["last_loss"] < summary["first_loss"]
        assert summary["sample"]
        assert len(summary["peak_memory_bytes_per_worker"]) == summary["workers"] == workers
        assert {key: summary[key] for key in THE_SAME} == {key: summaries[0][key] for key in THE_SAME}


def test_the_last_line_has_all_keys_of_the_summary(from_command_line: tuple[dict[str, Any], RunDirectory]) -> None:
    printed = from_command_line[0]
    assert set(KEYS.split()) <= set(printed)
    assert (printed["steps"], printed["workers"], printed["sharding"], printed["transport"]) == (
        STEPS,
        2,
        "zero2",
        "shared-memory",
    )
    assert printed["samples_per_second"] > 0
    assert printed["step_seconds_median"] > 0
    assert all(peak > 1 << 20 for peak in printed["peak_memory_bytes_per_worker"])


def test_the_run_directory_is_complete(from_command_line: tuple[dict[str, Any], RunDirectory]) -> None:
    printed, directory = from_command_line
    steps = directory.read_metrics()
    assert [each.step for each in steps] == list(range(1, STEPS + 1))
    for each in steps:
        assert each.loss > 0
        assert each.gradient_norm > 0
        assert each.learning_rates == (0.01,)
        assert each.step_seconds > 0
        assert {"data", "compute", "communication", "update", "waiting"} <= set(each.seconds)
        assert each.bytes_moved["grad"] > 0
    assert steps[-1].digest == printed["digest"]
    assert list(directory.tensorboard.glob("events.*"))
    assert directory.log(1).exists()
    assert f"step {STEPS}" in directory.log(0).read_text()
    assert [path.name for path in (directory.path / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    assert "started" in str(directory.read_recipe())
