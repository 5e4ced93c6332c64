"""A recipe file's tables. Imports neither the user's code nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from manyhands.config import Batch, Recipe, Strategy, Weights
from manyhands.training.toml_document import Table

Arguments = dict[str, JsonValue]

PLAIN_FIELDS = ("seed", "precision", "device", "clip_norm", "compile", "threads_per_worker", "optimizer_kind")
IMPORT_PATH = r"^\w+(\.\w+)*:\w+(\.\w+)*$"


class Target(Table):
    """Something that is imported and called with `arguments`."""

    path: str = Field(pattern=IMPORT_PATH)
    arguments: Arguments = {}


class GroupTable(Table):
    """The parameters whose names match (and that have so many dimensions), and what the optimizer does differently for
    them; with a path, the optimizer of their own."""

    match: list[str] = Field(min_length=1)
    dimensions: int | None = Field(default=None, ge=0)
    path: str | None = Field(default=None, pattern=IMPORT_PATH)
    arguments: Arguments = {}


class OptimizerTable(Target):
    """The optimizer, its param groups, and those with an optimizer of their own; the first that matches a parameter
    gets it."""

    groups: list[GroupTable] = []


class WeightsTable(Table):
    """`manyhands.Weights`, checked by it; or its path alone."""

    path: str = Field(min_length=1)
    rename: dict[str, str] = {}
    allow_missing: list[str] = []
    ignore: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("rename")
    @classmethod
    def _as_weights_checks(cls, value: dict[str, str]) -> dict[str, str]:
        Weights(path=".", rename=value)
        return value

    def build(self, folder: Path) -> Weights:
        """The Weights themselves; a relative path counts from `folder`."""
        return Weights(**self.model_dump() | {"path": folder / self.path})


class BatchTable(Table):
    """`manyhands.Batch`, checked by it."""

    global_size: int
    micro_size: int
    virtual_workers: int = Batch.virtual_workers

    @model_validator(mode="after")
    def _as_batch_checks(self) -> BatchTable:
        self.build()
        return self

    def build(self) -> Batch:
        """The Batch itself."""
        return Batch(**self.model_dump())


class StrategyTable(Table):
    """`manyhands.Strategy`, each field checked by it."""

    stage: str = Strategy.stage
    home: str = Strategy.home
    scratch: str = Strategy.scratch
    group: str = Strategy.group
    overlap: bool = Strategy.overlap
    units: list[str] = list(Strategy.units)
    activation_checkpointing: list[str] = list(Strategy.activation_checkpointing)
    prefetch: int = Strategy.prefetch
    loader_workers: int = Strategy.loader_workers
    stall_seconds: float = Strategy.stall_seconds

    @field_validator("stage", "home", "group", "prefetch", "loader_workers", "stall_seconds")
    @classmethod
    def _as_strategy_checks(cls, value: Any, info: ValidationInfo) -> Any:
        Strategy(**{str(info.field_name): value})
        return value

    def build(self) -> Strategy:
        """The Strategy itself."""
        lists = {"units": tuple(self.units), "activation_checkpointing": tuple(self.activation_checkpointing)}
        return Strategy(**{**self.model_dump(), **lists})


class RecipeSchema(Table):
    """A recipe file's tables, with defaults for what it leaves out; nothing of them is imported yet."""

    name: str = Field(min_length=1)
    seed: int = Recipe.seed
    precision: str = Recipe.precision
    device: str = Recipe.device
    clip_norm: float | None = Recipe.clip_norm
    compile: bool = Recipe.compile
    threads_per_worker: int = Recipe.threads_per_worker
    optimizer_kind: str | None = Recipe.optimizer_kind
    steps: int | None = Field(default=None, ge=1)
    model: Target
    loss: Target
    weights: WeightsTable | None = None
    data: Target
    collate: Target | None = None
    optimizer: OptimizerTable
    schedule: Target | None = None
    sample: Target | None = None
    batch: BatchTable
    strategy: StrategyTable = StrategyTable()

    @field_validator(*PLAIN_FIELDS)
    @classmethod
    def _as_recipe_checks(cls, value: Any, info: ValidationInfo) -> Any:
        # Recipe's own check of this one field; the rest is filled with what it doesn't object to.
        rest: dict[str, Any] = {"model": len, "loss": len, "optimizer": len, "data": ()}
        Recipe(**rest, batch=Batch(global_size=1, micro_size=1), **{str(info.field_name): value})
        return value
