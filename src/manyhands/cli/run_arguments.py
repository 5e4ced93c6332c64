"""Options of train and join. They become overrides of the recipe file, from which Recipe and Strategy are built.

The way from a command-line option to a `Recipe` and a `Strategy`:

1. In the command, `RunArguments.overrides` turns --set, --listener and the options of the strategy, such as --sharding,
   into overrides of the recipe file: texts such as "seed=1" or "strategy.sharding=zero2".
2. `RunArguments.request` puts the recipe's path, the overrides and the other options into one JSON value. The launcher
   passes this request to every worker process.
3. In each worker process, `cli/worker.py` calls `load_recipe` (documents/recipe_file.py) with the path and the
   overrides. It returns the `Recipe` and the `Strategy`, which the worker passes to `manyhands.train`.

Launchers of several hosts compare fingerprints of these values (`run_fingerprints`), so that all hosts train the same
run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyhands.cli.parameters import overrides_option
from manyhands.cli.workers import Workers, check_from_one
from manyhands.errors import ConfigError
from manyhands.storage.location import is_local

if TYPE_CHECKING:
    from manyhands.documents.recipe_file import RecipeSchema
    from manyhands.engine.step.amendments import Amendments


_PLACES = ("checkpoint_dir", "islands_at")
"""The options that name a folder or an address."""


@dataclass(frozen=True)
class RunArguments:
    """The parameters that determine a run. They must be equal on all hosts, except for the number of workers."""

    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: a TOML file.", show_default=False)]
    workers: Workers = None
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=check_from_one,
            help="Train up to this step (default: as in the recipe).",
            show_default=False,
        ),
    ] = None
    set_: Annotated[list[str] | None, overrides_option("such as seed=1 or batch.micro_size=2")] = None
    listener: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Send the figures to a listener: csv, tensorboard, wandb, mlflow, or module:name for your own. Repeat "
            "as needed. They take the place of the recipe's listeners.",
            show_default=False,
        ),
    ] = None
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder for metrics and checkpoints (default: runs/NAME-TIME). An existing run in it is resumed.",
            show_default=False,
        ),
    ] = None
    checkpoint_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Another place for checkpoints: a folder, or an address such as s3://bucket/folder.",
            show_default=False,
        ),
    ] = None
    checkpoint_every: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Steps or time between checkpoints: 500, 30s, 10m, 2h (default: only at the end, and when stopped).",
            show_default=False,
        ),
    ] = None
    keep_checkpoints: Annotated[
        int, typer.Option(metavar="N", callback=check_from_one, help="The number of newest checkpoints to keep.")
    ] = 3
    keep_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=check_from_one,
            help="Never delete the checkpoints of every N-th step.",
            show_default=False,
        ),
    ] = None
    keep_best: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIGURE",
            help="Keep the checkpoint with the best value of a figure of a validation, such as validation.loss:min or "
            "validation.accuracy:max. Repeat as needed.",
            show_default=False,
        ),
    ] = None
    digest_every: Annotated[
        int, typer.Option(metavar="N", callback=check_from_one, help="Steps between digests of the weights.")
    ] = 10
    accept_new_numerics: Annotated[
        bool,
        typer.Option(
            "--accept-new-numerics",
            help="Resume a run that was started with different numerics (another torch version, kind of CPU or "
            "number of threads).",
        ),
    ] = False
    islands_at: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Where the islands of a recipe with [islands] meet: a folder that all clusters see, or an address "
            "such as s3://bucket/folder. Without it, this command computes all islands.",
            show_default=False,
        ),
    ] = None
    islands: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="The islands that this cluster computes, such as 0,2; or auto, the default: clusters share the "
            "islands, and take over those of a cluster that is lost.",
            show_default=False,
        ),
    ] = None
    skip_step: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Skip the N-th step: its data are passed over. Repeat as needed. The run directory records it.",
            show_default=False,
        ),
    ] = None
    amend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="With --from-step: change a setting in the middle of the run, such as optimizer.lr=1e-4 or "
            "clip_norm=0.5. Repeat as needed. The run directory records it.",
            show_default=False,
        ),
    ] = None
    from_step: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="The first step with the settings of --amend.", show_default=False),
    ] = None

    def overrides(self, strategy: Mapping[str, Any]) -> list[str]:
        """Return the overrides of the recipe: those of --set and --listener, and the options of the strategy."""
        from manyhands.documents.toml import override_of

        listeners = [f"listeners={json.dumps(self.listener, ensure_ascii=False)}"] if self.listener else []
        return [
            *(self.set_ or []),
            *listeners,
            *(override_of(f"strategy.{name}", value) for name, value in strategy.items()),
        ]

    def last_step(self, checked: RecipeSchema) -> int | None:
        """Return the step at which the run ends, or None if the recipe has epochs. Raises ConfigError."""
        from manyhands.intervals import check_length, every

        if self.checkpoint_every is not None:
            every(self.checkpoint_every)
        steps = self.steps or checked.steps
        check_length(steps, checked.epochs, str(self.recipe))
        return steps

    def amendments(self) -> Amendments:
        """Return the steps to skip and the changed settings. Raises ConfigError."""
        from manyhands.documents.toml import parse_override
        from manyhands.engine.step.amendments import amendments_of

        if bool(self.amend) != (self.from_step is not None):
            raise ConfigError(
                "--amend and --from-step must be used together",
                expected="--amend optimizer.lr=1e-4 --from-step 500, for example",
                got="--amend alone" if self.amend else "--from-step alone",
            )
        settings = dict(parse_override("--amend", text) for text in self.amend or ())
        return amendments_of(self.skip_step or (), {} if self.from_step is None else {self.from_step: settings})

    def list_of_islands(self) -> list[int] | str | None:
        """Return the islands of --islands. Raises ConfigError."""
        if self.islands is None or self.islands == "auto":
            return self.islands
        parts = [part.strip() for part in self.islands.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ConfigError(
                "--islands is not a list of islands",
                expected="numbers from 0, such as 0,2; or auto",
                got=repr(self.islands),
            )
        return [int(part) for part in parts]

    def request(self, overrides: list[str], steps: int | None, run_dir: Path) -> dict[str, Any]:
        """Describe the training for the workers, as JSON values.

        The workers pass `training` on to `manyhands.train`.
        """
        return {
            "recipe": str(self.recipe.absolute()),
            "overrides": overrides,
            "run_dir": str(run_dir),
            "json": False,
            "training": {
                "steps": steps,
                "checkpoint_dir": self.checkpoint_dir,
                "checkpoint_every": self.checkpoint_every,
                "keep_checkpoints": self.keep_checkpoints,
                "keep_every": self.keep_every,
                "keep_best": self.keep_best or [],
                "digest_every": self.digest_every,
                "accept_new_numerics": self.accept_new_numerics,
                "islands_at": self.islands_at,
                "islands": self.list_of_islands(),
                "amendments": self.amendments().as_json(),
            },
        }

    def options(self, overrides: list[str], run_dir: Path, workers: int) -> list[str]:
        """Return the command-line arguments with which another host trains the same run, beginning with the recipe."""
        written = [str(self.recipe.absolute()), "--run-dir", str(run_dir.absolute()), "--workers", str(workers)]
        for override in overrides:
            written += ["--set", override]
        for field in fields(RunArguments):
            value = getattr(self, field.name)
            if field.name in _PLACES:
                value = _absolute(value)
            if field.name not in ("recipe", "workers", "set_", "listener", "run_dir") and value != field.default:
                flag = f"--{field.name.replace('_', '-')}"
                for each in value if isinstance(value, list) else [value]:
                    written += [flag] if each is True else [flag, str(each)]
        return written


def with_absolute_paths(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request with absolute folders, which mean the same on hosts with different working directories."""
    training = {**request["training"], **{name: _absolute(request["training"][name]) for name in _PLACES}}
    return {**request, "run_dir": _absolute(request["run_dir"]), "training": training}


def _absolute(path: str | None) -> str | None:
    """Return the absolute path of a local folder. Return an address in a store, or None, as it is."""
    return path if path is None or not is_local(path) else str(Path(path).absolute())


def run_fingerprints(checked: RecipeSchema, request: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of each value that must be equal on all hosts, by its key in the recipe or its option."""
    values = dict(_leaves(checked.model_dump(mode="json", exclude_none=True, exclude={"steps"})))
    request = with_absolute_paths(request)
    training = {key: value for key, value in request["training"].items() if key != "adopt"}
    for key, value in [("run_dir", request["run_dir"]), *training.items()]:
        values[f"--{key.replace('_', '-')}"] = value
    return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32] for key, value in values.items()}


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
