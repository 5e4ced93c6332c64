"""The public surface: its names, its options, and every example of the documentation, which is run as it stands."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import manyhands as mh
from manyhands.cli.main import app
from support.corpus import write_corpus
from test_bad_input import recipe

DOCS = Path(__file__).resolve().parents[1] / "docs"

NAMES = [
    "Aggregate",
    "ArrayFile",
    "Average",
    "Averaging",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Dataset",
    "DryRun",
    "Engine",
    "Evaluation",
    "ExportSummary",
    "Interrupted",
    "InvariantError",
    "Islands",
    "Listener",
    "ManyhandsError",
    "Nesterov",
    "NumericsError",
    "PrepareSummary",
    "Recipe",
    "StepMetrics",
    "Strategy",
    "Stream",
    "Summary",
    "TokenFile",
    "Validation",
    "Weights",
    "WorkerError",
    "ZarrLayout",
    "by_length",
    "digest_of_tensors",
    "dry_run",
    "evaluate",
    "export",
    "launch",
    "listeners",
    "load_model",
    "load_recipe",
    "metrics",
    "stop",
    "train",
    "weighted",
]

OPTIONS = {
    "train": {
        "--accept-new-numerics",
        "--adopt",
        "--amend",
        "--from-step",
        "--skip-step",
        "--checkpoint-dir",
        "--checkpoint-every",
        "--islands",
        "--islands-at",
        "--digest-every",
        "--dry-run",
        "--transport",
        "--offload",
        "--hosts",
        "--json",
        "--keep-best",
        "--keep-checkpoints",
        "--keep-every",
        "--listener",
        "--loader-workers",
        "--max-restarts",
        "--rendezvous",
        "--run-dir",
        "--scratch",
        "--set",
        "--snapshot-every",
        "--sharding",
        "--stall-seconds",
        "--start-over",
        "--steps",
        "--workers",
        "-n",
        "recipe",
    },
    "run": {"--max-restarts", "--module", "--workers", "-m", "-n", "script"},
    "compare": {"--json", "other", "run"},
    "join": {
        "--amend",
        "--from-step",
        "--skip-step",
        "--accept-new-numerics",
        "--checkpoint-dir",
        "--checkpoint-every",
        "--islands",
        "--islands-at",
        "--digest-every",
        "--keep-best",
        "--keep-checkpoints",
        "--keep-every",
        "--listener",
        "--loader-workers",
        "--offload",
        "--run-dir",
        "--scratch",
        "--set",
        "--sharding",
        "--stall-seconds",
        "--steps",
        "--transport",
        "--workers",
        "-n",
        "endpoint",
        "recipe",
    },
    "doctor": {"--json", "--run-dir", "run"},
    "prepare": {
        "--engine",
        "--json",
        "--max-bad-records",
        "--memory",
        "--out",
        "--set",
        "--workers",
        "-n",
        "recipe",
    },
    "evaluate": {
        "--accept-new-numerics",
        "--json",
        "--only",
        "--set",
        "--step",
        "--weights",
        "--workers",
        "-n",
        "recipe",
        "run",
    },
    "new": {"folder"},
    "reproduce": {"--json", "--run-dir", "--set", "--workers", "-n", "recipe", "run"},
    "sample": {"--accept-new-numerics", "--set", "--step", "--weights", "--workers", "-n", "recipe", "run"},
    "export": {"--dtype", "--json", "--max-shard-size", "--merge", "--step", "--weights", "out", "run"},
}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_page(page: str, folder: Path) -> None:
    """Write the blocks that start with `# file: NAME` to files, and run the other Python blocks in order."""
    programs = []
    for language, text in blocks(page):
        file = re.match(r"# file: (\S+)\n", text)
        if file:
            (folder / file[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            programs.append(text)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(programs, 1):
        exec(compile(text, f"docs/{page}, Python block {number}", "exec"), namespace)


def test_the_public_names_are_fixed() -> None:
    assert mh.__all__ == NAMES == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name: str) -> None:
    # A dataclass without a docstring is given its signature as one.
    text = getattr(mh, name).__doc__ or f"{name}("
    assert not text.startswith(f"{name}("), f"{name} has no docstring"
    examples = "".join(text for language, text in blocks("api.md") if language == "python")
    assert re.search(rf"\bmh\.{name}\b", examples), f"docs/api.md has no example of {name}"


def test_public_methods_are_documented() -> None:
    for kind in (mh.Engine, mh.Batch, mh.Dataset, mh.Aggregate, mh.ArrayFile, mh.TokenFile, mh.Listener):
        for base in kind.__mro__[:-1]:
            for name, value in vars(base).items():
                if not name.startswith("_") and (callable(value) or isinstance(value, property)):
                    assert value.__doc__, f"{base.__name__}.{name}"


# peft asks transformers for a property by the name that it had before transformers 5.24.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "page",
    [
        "api.md",
        "tutorial.md",
        "recipe-files.md",
        "models.md",
        "prepare.md",
        "zarr.md",
        "validation.md",
        "streams.md",
        "islands.md",
        "listeners.md",
    ],
)
def test_the_examples_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if page == "models.md" and not all(map(importlib.util.find_spec, ("transformers", "peft", "keras"))):
        pytest.skip("the extra `models` isn't installed")
    if page == "zarr.md" and not all(map(importlib.util.find_spec, ("zarr", "xarray", "netCDF4"))):
        pytest.skip("the extra `arrays` isn't installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    run_page(page, tmp_path)
    for name in ("line", "sine_model"):
        sys.modules.pop(name, None)


def test_the_ported_scripts_run(tmp_path: Path) -> None:
    """In a process of their own, because Accelerate and the Trainer change global state."""
    if not all(map(importlib.util.find_spec, ("transformers", "accelerate"))):
        pytest.skip("the extra `models` isn't installed")
    script = "\n".join(text for language, text in blocks("porting.md") if language == "python")
    (tmp_path / "ported.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "ported.py"], capture_output=True, text=True, cwd=tmp_path, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 12: validation loss" in done.stderr


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = mh.Trainer  # type: ignore[attr-defined]


def test_importing_loads_no_heavy_package_and_starts_nothing() -> None:
    program = textwrap.dedent("""
        import sys, threading
        import manyhands
        heavy = {"torch", "numpy", "pydantic", "rich", "typer"} & set(sys.modules)
        assert not heavy, heavy
        assert threading.active_count() == 1
        assert all(hasattr(manyhands, name) for name in manyhands.__all__[:5])
    """)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_options_of_commands_are_fixed() -> None:
    command = typer.main.get_command(app)
    found = {
        name: {option for parameter in sub.params for option in parameter.opts}
        for name, sub in command.commands.items()  # type: ignore[attr-defined]
    }
    assert found == OPTIONS
    for name, sub in command.commands.items():  # type: ignore[attr-defined]
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0
        for parameter in sub.params:
            help_text = getattr(parameter, "help", None) or ""
            assert help_text[:30].strip("`") in shown.output, f"{name} {parameter.name}"
            assert help_text, f"{name} {parameter.name}"


WITHOUT_TORCH: dict[str, tuple[int, str]] = {
    "--version": (0, "manyhands"),
    "--help": (0, "doctor"),
    **{f"{name} --help": (0, name) for name in OPTIONS},
    "compare one one": (0, "equal"),
    "compare --json one other": (1, '"equal": false'),
    "compare one nowhere": (2, "nowhere"),
    "prepare corpus.toml --workers 1": (0, "tokens"),
    "prepare nowhere.toml": (2, "nowhere.toml"),
    "train nowhere.toml": (2, "nowhere.toml"),
    "train corpus.toml": (2, "corpus.toml"),
    "run nowhere.py": (2, "nowhere.py"),
}
"""The commands that answer without the second or two that torch takes to import: exit code and part of the output."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two different runs, a corpus, and a module named torch that writes a file when it is imported."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("one", "other")):
        mh.train(recipe(seed=seed), steps=1, run_dir=folder / name, digest_every=1, show=False)
    write_corpus(folder, 8)
    (folder / "path").mkdir()
    program = f"open({str(folder / 'imported')!r}, 'w')\nraise ImportError('torch must not be imported')\n"
    (folder / "path" / "torch.py").write_text(program)
    return folder


@pytest.mark.parametrize("arguments", WITHOUT_TORCH)
def test_a_command_that_needs_no_torch_does_not_import_it(arguments: str, runs: Path) -> None:
    """The processes that the command starts do not import it either."""
    code, text = WITHOUT_TORCH[arguments]
    imported = runs / "imported"
    imported.unlink(missing_ok=True)
    path = os.pathsep.join([str(runs / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "manyhands.cli.main", *arguments.split()],
        cwd=runs,
        env={**os.environ, "PYTHONPATH": path, "TERM": "dumb", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert text in done.stdout + done.stderr
    assert not imported.exists()
