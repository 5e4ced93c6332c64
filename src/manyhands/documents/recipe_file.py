"""Recipe files: `load_recipe` builds a Recipe and a Strategy from a file and the overrides of the command line.

[model]
    path = "gpt:GPT"              # module:attribute; the file's own folder is searched first
    arguments = { depth = 4 }

`check_recipe_file` validates a file; it imports neither the user's code nor torch. `load_recipe` also imports the
objects that the paths name, and checks the arguments against the signatures of these objects. So errors are reported
with file and line before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from manyhands.average import Average
from manyhands.config import Batch, Recipe, Strategy
from manyhands.documents.functions import IMPORT_PATH, Arguments, Binder, Target
from manyhands.documents.import_check import check_imports
from manyhands.documents.listener_tables import ListenerTable, bind_listeners, check_packages
from manyhands.documents.option_table import BuildableTable, OptionTable
from manyhands.documents.toml import Document, Table, raise_all, read_document
from manyhands.errors import ConfigError
from manyhands.islands import Islands
from manyhands.options import hint_nearest
from manyhands.storage.location import is_local
from manyhands.validation import Validation
from manyhands.weights import Weights

if TYPE_CHECKING:
    from torch import nn


class GroupTable(Table):
    """Parameters whose names match a pattern in `match`, and the optimizer's arguments for them.

    dimensions: only parameters with this number of dimensions match. path: an optimizer for these parameters alone.
    """

    match: list[str] = Field(min_length=1)
    dimensions: int | None = Field(default=None, ge=0)
    path: str | None = Field(default=None, pattern=IMPORT_PATH)
    arguments: Arguments = {}

    def further_arguments(self) -> Iterator[tuple[int, Arguments]]:
        """Yield nothing, because a group has no groups."""
        yield from ()


class OptimizerTable(Target):
    """The optimizer and its param groups. A parameter belongs to the first group that matches."""

    groups: list[GroupTable] = []

    def further_arguments(self) -> Iterator[tuple[int, Arguments]]:
        for index, group in enumerate(self.groups):
            if group.path is None:
                yield index, group.arguments


class WeightsTable(BuildableTable[Weights]):
    """The options of `manyhands.Weights`, or only its path."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class MetricTable(Table):
    """A metric of `manyhands.metrics` by name, or a function, a class or an object by path; and its arguments."""

    name: str | None = Field(default=None, pattern=r"^\w+$")
    path: str | None = Field(default=None, pattern=IMPORT_PATH)
    arguments: Arguments = {}

    @model_validator(mode="after")
    def _has_name_or_path(self) -> MetricTable:
        if (self.name is None) == (self.path is None):
            raise ConfigError("a metric needs either a name or a path", expected='{ name = "f1", arguments = {...} }')
        return self

    @property
    def target(self) -> Target:
        """Return the path of the metric or of the function that creates it, and the arguments."""
        return Target(path=self.path or f"manyhands.metrics:{self.name}", arguments=self.arguments)


class ValidationTable(OptionTable[Validation]):
    """A set of data on which the model is evaluated, and the metrics. Options are those of `manyhands.Validation`."""

    data: Target
    metrics: list[str | MetricTable] = []
    collate: Target | None = None
    predict: Target | None = None


class IslandsTable(BuildableTable[Islands]):
    """The options of `manyhands.Islands`."""

    every: int | str | dict[str, int] = "auto"
    outer: str | dict[str, float] = "auto"


class RecipeSchema(OptionTable[Recipe]):
    """The tables of a recipe file, with defaults. The objects that they name are not imported."""

    name: str = Field(min_length=1)
    steps: int | None = Field(default=None, ge=1)
    model: Target
    loss: Target
    weights: WeightsTable | None = None
    data: Target
    collate: Target | None = None
    optimizer: OptimizerTable
    schedule: Target | None = None
    sample: Target | None = None
    order: str | Target = "random"
    validation: ValidationTable | None = None
    validations: dict[str, ValidationTable] = {}
    listeners: list[ListenerTable] = []
    average: BuildableTable[Average] | None = None
    islands: IslandsTable | None = None
    batch: BuildableTable[Batch]
    strategy: BuildableTable[Strategy] = BuildableTable[Strategy]()


CALLED_WITH = {  # the positional arguments that each function gets before the arguments of its table
    "model": (),
    "loss": ("model", "batch"),
    "data": (),
    "collate": ("samples",),
    "optimizer": ("params",),
    "schedule": ("optimizer",),
    "sample": ("model",),
}

CALLED_IN_VALIDATION = {"data": (), "collate": ("samples",), "predict": ("model", "batch")}

CALLED_AS_METRIC = ("output", "batch")


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A loaded recipe file.

    steps: the number of steps, if the file sets it. settings: the recipe as used, with defaults and overrides, as JSON
    values. listeners: functions that create the listeners, given the run directory.
    """

    recipe: Recipe
    strategy: Strategy
    steps: int | None
    settings: dict[str, Any]
    listeners: list[Callable[[Path], Any]] = field(default_factory=list)


def check_recipe_file(path: str | Path, overrides: Sequence[str] = ()) -> RecipeSchema:
    """Read and validate a recipe file. Imports neither torch nor what the file names, but checks that the named modules
    and functions exist.

    overrides: `key=value` with dotted keys, such as "optimizer.arguments.lr=1e-3".
    Raises one ConfigError that lists all problems, each with file and line.
    """
    document = read_document(path, overrides, RecipeSchema)
    check_imports(document)
    check_packages(document.schema.listeners, document)
    return document.schema


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read a recipe file, import the objects that it names, and create its data set. The model is built later.

    Inserts the file's folder at the front of sys.path, where it stays, because data sets and models may import later.
    Raises one ConfigError that lists all problems, each with file and line. Errors from the data set are not converted.
    """
    document = read_document(path, overrides, RecipeSchema)
    functions, validations, listeners = _import_all(document)
    data = functions["data"]()
    schema, weights = document.schema, _weights(document)
    try:
        recipe = Recipe(
            **functions | {"data": data},
            validation={name: build() for name, build in validations.items()} or None,
            **schema.option_values(),
            weights=weights,
            average=None if schema.average is None else schema.average.build(),
            islands=None if schema.islands is None else schema.islands.build(),
            batch=schema.batch.build(),
            name=schema.name,
            source=str(document.path),
        )
    except ConfigError as error:
        raise document.relocated(error) from None
    settings = schema.model_dump(exclude_none=True)
    for table in ("validations", "listeners"):
        if not settings[table]:
            del settings[table]
    if weights is not None:
        settings["weights"]["path"] = weights.path
    return RecipeFile(
        recipe=recipe,
        strategy=schema.strategy.build(),
        steps=schema.steps,
        settings=settings,
        listeners=listeners,
    )


def _weights(document: Document[RecipeSchema]) -> Weights | None:
    """Return the initial weights.

    A path, unlike an address, is relative to the recipe's folder, or to the working directory if an override set it.
    """
    table = document.schema.weights
    overridden = document.origin("weights", "path").startswith("--set")
    if table is None:
        return None
    if not is_local(str(table.path)):
        return table.build()
    folder = Path() if overridden else document.path.parent
    return table.build(path=folder.absolute() / table.path)


def _import_all(
    document: Document[RecipeSchema],
) -> tuple[dict[str, Any], dict[str, Callable[[], Validation]], list[Callable[[Path], Any]]]:
    """Return the recipe's functions by table, functions that build its validations, by name, and its listeners.

    Raises one ConfigError for all problems.
    """
    schema, binder = document.schema, Binder(document)
    functions: dict[str, Any] = {"order": schema.order}
    for table, called_with in CALLED_WITH.items():
        target: Target | None = getattr(schema, table)
        if target is not None:
            functions[table] = binder.bind(target, called_with, table, noted=table not in ("loss", "collate", "sample"))
    order = None if isinstance(schema.order, str) else binder.bind(schema.order, (), "order")
    own = {
        index: binder.bind(group, CALLED_WITH["optimizer"], "optimizer", "groups", index)
        for index, group in enumerate(schema.optimizer.groups)
        if group.path is not None
    }
    validations = {name: _bound(table, binder, "validations", name) for name, table in schema.validations.items()}
    if schema.validation is not None:
        if "validation" in validations:
            raise ConfigError(
                "there are two validations with the name 'validation'",
                where=document.origin("validations", "validation"),
                expected="[validation], or [validations.validation], or another name",
            )
        validations["validation"] = _bound(schema.validation, binder, "validation")
    listeners = bind_listeners(schema.listeners, binder)
    raise_all(binder.problems, document.path)
    if schema.optimizer.groups:
        functions["optimizer"] = _grouped(functions["optimizer"], own, document)
    if order is not None:
        functions["order"] = order()
    return functions, validations, listeners


def _bound(table: ValidationTable, binder: Binder, *key: str) -> Callable[[], Validation]:
    """Import the functions of a validation, and return a function that builds it."""
    found: dict[str, Any] = {}
    for name, called_with in CALLED_IN_VALIDATION.items():
        target: Target | None = getattr(table, name)
        if target is not None:
            found[name] = binder.bind(target, called_with, *key, name, noted=name == "data")
    metrics: list[Any] = []
    for index, metric in enumerate(table.metrics):
        if isinstance(metric, str) and ":" not in metric:
            metrics.append(metric)
            continue
        place: tuple[str | int, ...] = (*key, "metrics", index)
        if isinstance(metric, MetricTable) and metric.name is not None:
            function = binder.bind(metric.target, (), *place, noted=False)
            metrics.append(function() if not binder.problems else function)
        else:
            target = Target(path=metric) if isinstance(metric, str) else metric.target
            metrics.append(binder.bind_or_make(target, CALLED_AS_METRIC, *place))
    return lambda: Validation(**table.option_values(), **found | {"data": found["data"](), "metrics": metrics})


def _grouped(
    rest: Callable[..., Any], own: dict[int, Callable[..., Any]], document: Document[RecipeSchema]
) -> Callable[..., Any]:
    """Return a factory of the optimizers: one optimizer for each group with a path, and one for all other parameters.

    The factory raises ConfigError if a pattern matches no parameter.
    """
    groups = document.schema.optimizer.groups
    patterns = [(index, pattern) for index, group in enumerate(groups) for pattern in group.match]

    def matches(index: int, pattern: str, name: str, param: nn.Parameter) -> bool:
        return fnmatchcase(name, pattern) and groups[index].dimensions in (None, param.ndim)

    def build(named_params: list[tuple[str, nn.Parameter]]) -> Any:
        names = [name for name, _ in named_params]
        parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
        problems = [
            ConfigError(
                f"optimizer.groups.{index}.match: {pattern!r} matches no parameter",
                where=document.origin("optimizer", "groups", index, "match"),
                expected=f"a pattern for names like {', '.join(names[:3])}"
                + (
                    ""
                    if groups[index].dimensions is None
                    else f" (the parameter must have {groups[index].dimensions} dimensions)"
                ),
                hint=hint_nearest(pattern.strip("*."), parts),
            )
            for index, pattern in patterns
            if not any(matches(index, pattern, *named) for named in named_params)
        ]
        raise_all(problems, document.path)
        members: dict[int, list[tuple[str, nn.Parameter]]] = {index: [] for index in range(-1, len(groups))}
        for named in named_params:
            first = next((index for index, pattern in patterns if matches(index, pattern, *named)), -1)
            members[first].append(named)
        options = {-1: {}, **{index: group.arguments for index, group in enumerate(groups)}}
        shared = [
            {"params": params, **options[index]} for index, params in members.items() if params and index not in own
        ]
        optimizers = [rest(shared)] if shared else []
        optimizers += [make(members[index]) for index, make in own.items() if make is not None and members[index]]
        return optimizers if own else optimizers[0]

    return build
