"""An option is declared once: Python, TOML and the command line take name, type, help text and check from there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

import manyhands as mh
from manyhands.cli.main import app
from manyhands.cli.parameters import with_parameters
from manyhands.documents.option_table import BuildableTable, OptionTable, option_names
from manyhands.documents.recipe_file import check_recipe_file
from manyhands.documents.toml import apply_override, override_of
from manyhands.errors import ConfigError
from manyhands.options import check_options, declared, option, options
from manyhands.prepare.options import JobOptions, Options
from support.models import gpt_recipe

WIDE = {"COLUMNS": "1000", "TERM": "dumb"}


@options
class Extended(mh.Strategy):
    """A strategy with one more option."""

    fan_out: int = option(
        default=2, at_least=1, flags=("--fan-out",), flag_type=int, metavar="N", help="Children of each node."
    )
    colours: tuple[str, ...] = option(default=("red",), help="Names of colours.")


@dataclass(frozen=True)
class Arguments:
    """Parameters of a command."""

    recipe: Annotated[str, typer.Argument()]


@pytest.mark.parametrize("owner", [mh.Batch, mh.Weights, mh.Recipe, mh.Strategy, Options])
def test_every_field_is_a_declared_option_that_the_docstring_describes(owner: type) -> None:
    assert list(declared(owner)) == [field.name for field in fields(owner)]
    text = " ".join((owner.__doc__ or "").split())
    for name, each in declared(owner).items():
        assert f"{name}: {each.help}" in text
        assert all(choice in each.help for choice in each.choices)


@pytest.mark.parametrize("owner", [mh.Batch, mh.Weights, mh.Strategy])
def test_every_option_is_in_the_toml_table(owner: Any) -> None:
    columns = BuildableTable[owner].model_fields
    assert {name: column.description for name, column in columns.items()} == {
        name: each.help for name, each in declared(owner).items()
    }


def test_the_options_of_a_recipe_that_are_plain_values_are_at_the_top_of_a_recipe_file() -> None:
    plain = {"seed", "precision", "device", "clip_norm", "compile", "threads_per_worker", "optimizer_kind"}
    plain |= {"fractional_weights", "buffers", "attributes", "epochs", "epoch_end", "ema", "schedule_on"}
    plain.add("eval_modules")
    assert set(option_names(mh.Recipe)) == set(OptionTable[mh.Recipe].model_fields) == plain


@pytest.mark.parametrize(("command", "owner"), [("train", mh.Strategy), ("prepare", Options)])
def test_flags_have_the_help_text_of_their_option(command: str, owner: type) -> None:
    shown = " ".join(CliRunner().invoke(app, [command, "--help"], env=WIDE).output.split())
    found = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    by_name = {parameter.name: parameter for parameter in found}
    for name, each in declared(owner).items():
        if each.flags:
            assert tuple(by_name[name].opts) == each.flags
            assert by_name[name].help == each.help
            assert each.help in shown
        else:
            assert name not in by_name


def test_one_declaration_adds_an_option_everywhere() -> None:
    with pytest.raises(mh.ConfigError, match=r"extended\.fan_out is out of range"):
        Extended(fan_out=0)
    table = BuildableTable[Extended]
    assert table.model_validate({"fan_out": 3, "colours": ["blue"]}).build() == Extended(fan_out=3, colours=("blue",))
    with pytest.raises(ValidationError, match=r"extended\.fan_out is out of range"):
        table.model_validate({"fan_out": 0})
    with pytest.raises(ValidationError, match="valid integer"):
        table.model_validate({"fan_out": "3"})

    calls = []
    command = typer.Typer(add_completion=False)
    command.command()(
        with_parameters(Arguments, Extended, after="recipe", as_overrides=True)(lambda *given: calls.append(given))
    )
    shown = " ".join(CliRunner().invoke(command, ["--help"], env=WIDE).output.split())
    assert "--fan-out N Children of each node." in shown
    assert CliRunner().invoke(command, ["recipe.toml", "--fan-out", "5"]).exit_code == 0
    assert CliRunner().invoke(command, ["recipe.toml", "--sharding", "ddp"]).exit_code == 0
    assert calls == [(Arguments("recipe.toml"), {"fan_out": 5}), (Arguments("recipe.toml"), {"sharding": "ddp"})]


def test_choices_and_ranges_are_checked_when_an_object_is_created() -> None:
    @options
    class Colour:
        name: str = option(choices=("red", "blue"), help="Which colour.")
        share: float | None = option(default=None, at_least=0.5, help="How much of it.")

        def __post_init__(self) -> None:
            check_options(self)

    assert Colour(name="red").share is None
    with pytest.raises(mh.ConfigError, match=r"colour\.name has an unknown value") as caught:
        Colour(name="bleu")
    assert caught.value.hint == "did you mean 'blue'?"
    for wrong in (0.2, True, "1", float("inf"), float("nan")):
        with pytest.raises(mh.ConfigError, match=r"colour\.share is out of range"):
            Colour(name="red", share=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Colour("red")  # type: ignore[call-arg]


def test_the_types_of_job_options_are_those_that_are_declared() -> None:
    assert list(JobOptions.__annotations__) == [field.name for field in fields(Options)]
    annotations = {name: annotation.__forward_arg__ for name, annotation in JobOptions.__annotations__.items()}
    assert annotations == {field.name: field.type for field in fields(Options)}


@pytest.mark.parametrize("value", ["zero2", "5", "true", "/a b/c", " x ", '"quoted"', "[1]", "é", 3, 2.5])
def test_an_override_keeps_its_value(value: str | float) -> None:
    values: dict[str, Any] = {}
    assert apply_override(override_of("strategy.scratch", value), values, {}) is None
    assert values == {"strategy": {"scratch": value}}


def test_flags_of_a_strategy_override_the_recipe(tmp_path: Path) -> None:
    recipe = Path(__file__).parent / "support" / "started.toml"
    overrides = ["strategy.loader_workers=1", override_of("strategy.scratch", str(tmp_path / "1"))]
    built = check_recipe_file(recipe, overrides).strategy.build()
    assert built == mh.Strategy(loader_workers=1, scratch=str(tmp_path / "1"))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, torch.tensor])
def test_options_accept_integers_of_numpy_and_torch(kind: Any, tmp_path: Path) -> None:
    batch = mh.Batch(global_size=kind(4), micro_size=kind(2))
    assert (type(batch.global_size), batch.global_size, batch.micro_batches) == (int, 4, 2)
    recipe = gpt_recipe(batch=batch, seed=kind(3), clip_norm=np.float32(0.5), threads_per_worker=kind(1))
    assert (type(recipe.seed), type(recipe.clip_norm)) == (int, float)
    strategy = mh.Strategy(unshard_ahead=kind(2), stall_seconds=kind(60))
    summary = mh.train(
        recipe,
        steps=kind(2),
        strategy=strategy,
        run_dir=tmp_path,
        checkpoint_every=kind(1) if kind is not torch.tensor else 1,
        keep_checkpoints=kind(1),
        keep_every=kind(2),
        digest_every=kind(1),
        show=False,
    )
    plain = gpt_recipe(batch=mh.Batch(global_size=4, micro_size=2), seed=3, clip_norm=0.5)
    assert summary.digest == mh.train(plain, steps=2, show=False).digest
    assert Options(workers=kind(2)).workers == 2
    assert len(mh.Dataset.from_records([1, 2], partition_bytes=kind(9)).take(kind(1), workers=0, progress=False)) == 1


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", torch.tensor(True), torch.ones(2), None])
def test_integer_options_refuse_what_is_no_integer(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"batch\.micro_size is out of range"):
        mh.Batch(global_size=4, micro_size=value)
    with pytest.raises(ConfigError, match=r"must be at least 1|is not set"):
        mh.train(gpt_recipe(), steps=value, show=False)
