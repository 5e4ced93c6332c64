"""Recipe files: tables, imports and checks of arguments.

A recipe file's tables. Imports neither the user's code nor torch.

Recipes as TOML files: a file's import paths and arguments become a `Recipe`.
    [model]
    path = "gpt:GPT"              # module:attribute; the file's own folder is looked in first
    arguments = { depth = 4 }

What a path names is imported and its arguments are held against its signature here, so that a slip is told with its
line before anything is built. `recipe_schema` has the file's form, and its check that imports nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, JsonValue, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from manyhands.config import Batch, Recipe, Strategy, Weights, hint_nearest
from manyhands.documents.toml import Document, KeyPath, Table, dotted, raise_all, read_document, to_toml
from manyhands.errors import ConfigError, ManyhandsError

if TYPE_CHECKING:
    from torch import nn

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

    sharding: str = Strategy.sharding
    offload: str = Strategy.offload
    scratch: str = Strategy.scratch
    transport: str = Strategy.transport
    overlap: bool = Strategy.overlap
    units: list[str] = list(Strategy.units)
    activation_checkpointing: list[str] = list(Strategy.activation_checkpointing)
    unshard_ahead: int = Strategy.unshard_ahead
    loader_workers: int = Strategy.loader_workers
    stall_seconds: float = Strategy.stall_seconds

    @field_validator("sharding", "offload", "transport", "unshard_ahead", "loader_workers", "stall_seconds")
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


CALLED_WITH = {  # what each function gets by position, before its arguments
    "model": (),
    "loss": ("model", "batch"),
    "data": (),
    "collate": ("samples",),
    "optimizer": ("params",),
    "schedule": ("optimizer",),
    "sample": ("model",),
}

NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe file, read.

    steps: how long to train, if the file says so. settings: the recipe as it was used, defaults and overrides
    included, of JSON's types only. text: the same as TOML; kept beside the file's modules, it is the same recipe.
    """

    recipe: Recipe
    strategy: Strategy
    steps: int | None
    text: str
    settings: dict[str, Any]


def check_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeSchema:
    """Read a recipe file and check its form; imports neither what it names nor torch.

    overrides: `key=value` with dotted keys, such as "optimizer.arguments.lr=1e-3".
    Raises one ConfigError that tells all problems, each with file and line.
    """
    return read_document(path, overrides, RecipeSchema).schema


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read a recipe file, import what it names and make its data set; the model is built later, by the recipe.

    The file's folder is put first on sys.path and stays there: what reads data or builds the model may import later.
    Raises one ConfigError that tells all problems, each with file and line; what the data set raises comes through.
    """
    document = read_document(path, overrides, RecipeSchema)
    functions = _import_all(document)
    data = functions["data"]()
    schema, weights = document.schema, _weights(document)
    try:
        recipe = Recipe(
            **functions | {"data": data},
            **{field: getattr(schema, field) for field in PLAIN_FIELDS},
            weights=weights,
            batch=schema.batch.build(),
            name=schema.name,
            source=str(document.path),
        )
    except ConfigError as error:
        raise document.relocated(error) from None
    settings = schema.model_dump(exclude_none=True)
    if weights is not None:
        settings["weights"]["path"] = weights.path
    strategy = schema.strategy.build()
    return RecipeFile(recipe=recipe, strategy=strategy, steps=schema.steps, text=to_toml(settings), settings=settings)


def _weights(document: Document[RecipeSchema]) -> Weights | None:
    """The initial weights; a path counts from the recipe's folder, or from the working one if an override gave it."""
    table = document.schema.weights
    overridden = document.origin("weights", "path").startswith("--set")
    return None if table is None else table.build((Path() if overridden else document.path.parent).absolute())


def _import_all(document: Document[RecipeSchema]) -> dict[str, Callable[..., Any]]:
    """The recipe's functions by table, with their arguments filled in. Raises one ConfigError for all problems."""
    folder = document.path.absolute().parent
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    functions: dict[str, Callable[..., Any]] = {}
    problems: list[ConfigError] = []

    def bind(target: Target | GroupTable, *key: str | int) -> Callable[..., Any] | None:
        table = str(key[0])
        try:
            function = find_function(str(target.path), folder)
        except ConfigError as error:
            error.what, error.where = f"{dotted(key)}.path: {error.what}", document.origin(*key, "path")
            problems.append(error)
            return None
        problems.extend(_argument_problems(key, function, target, document))
        bound = functools.partial(function, **target.arguments)
        return bound if table in ("loss", "collate", "sample") else _noted(bound, document.origin(*key), table)

    for table in CALLED_WITH:
        target: Target | None = getattr(document.schema, table)
        bound = None if target is None else bind(target, table)
        if bound is not None:
            functions[table] = bound
    groups = enumerate(document.schema.optimizer.groups)
    own = {index: bind(group, "optimizer", "groups", index) for index, group in groups if group.path is not None}
    raise_all(problems, document.path)
    if document.schema.optimizer.groups:
        functions["optimizer"] = _grouped(functions["optimizer"], own, document)
    return functions


def find_function(path: str, folder: Path) -> Callable[..., Any]:
    """What `module:attribute` names. Raises ConfigError without a place."""
    module_name, _, attribute = path.partition(":")
    found: Any = _import(module_name, folder)
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [known for known in dir(found) if not known.startswith("_")]
            owner = getattr(found, "__name__", path)
            hint = hint_nearest(name, public)
            raise ConfigError(f"{owner} has no {name}", expected="module:attribute", got=repr(path), hint=hint)
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"{path} can't be called", expected="a function or a class", got=repr(found))
    return found  # type: ignore[no-any-return]


def _import(name: str, folder: Path) -> Any:
    try:
        module = importlib.import_module(name)
    except ManyhandsError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            *parents, last = missing.split(".")
            paths = getattr(sys.modules.get(".".join(parents)), "__path__", ()) if parents else [str(folder)]
            hint = hint_nearest(last, [found.name for found in pkgutil.iter_modules(paths)])
            looked = f"a module in {folder}, or an installed one"
            raise ConfigError(f"there is no module {missing}", expected=looked, got=repr(name), hint=hint) from None
        raise _import_failed(name, error) from error
    except Exception as error:  # whatever the user's module raises while it's imported
        raise _import_failed(name, error) from error
    _check_not_another(name, folder)
    return module


def _import_failed(name: str, error: Exception) -> ConfigError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
    at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""  # else it's in the message: bad syntax, say
    return ConfigError(f"module {name} can't be imported", got=f"{type(error).__name__}: {error}{at}")


def _check_not_another(name: str, folder: Path) -> None:
    """Python imports a name once per process: refuse a module of that name that came from elsewhere before."""
    top = name.partition(".")[0]
    used = getattr(sys.modules[top], "__file__", None) or "built into Python"
    own = [file for file in (folder / f"{top}.py", folder / top / "__init__.py") if file.is_file()]
    if own and Path(used).resolve() not in [file.resolve() for file in own]:
        raise ConfigError(
            f"another module {top} is already imported",
            expected=str(own[0]),
            got=used,
            hint=f"rename {own[0].name}, or load the recipe in a fresh process",
        )


def _argument_problems(
    key: KeyPath, function: Callable[..., Any], target: Target | GroupTable, document: Document[RecipeSchema]
) -> list[ConfigError]:
    """Arguments that the function doesn't take, and what it wants and isn't given. key: the table's."""
    table = str(key[0])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C don't tell
        return []
    parameters = signature.parameters.values()
    takes = [p.name for p in parameters if p.kind in NAMED]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names_only = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in parameters], return_annotation=signature.empty
    )
    expected = f"{target.path}{names_only}"
    problems = []

    def unknown(names: Iterable[str], *key: str | int) -> None:
        for name in names:
            if name not in takes and not takes_any:
                what = f"{dotted(key)}.{name}: {target.path} takes no {name}"
                hint = hint_nearest(name, takes[len(CALLED_WITH[table]) :])
                where = document.origin(*key, name)
                problems.append(ConfigError(what, expected=expected, where=where, hint=hint))

    unknown(target.arguments, *key, "arguments")
    if key == ("optimizer",):
        for index, group in enumerate(document.schema.optimizer.groups):
            if group.path is None:
                unknown(group.arguments, *key, "groups", index, "arguments")
    try:
        known = {name: value for name, value in target.arguments.items() if name in takes or takes_any}
        signature.bind(*CALLED_WITH[table], **known)
    except TypeError as error:
        called = ", ".join([*CALLED_WITH[table], *(f"{name}=..." for name in known)])
        what = f"{dotted(key)}.arguments don't fit {target.path}: {error}"
        where = document.origin(*key, "arguments")
        problems.append(ConfigError(what, expected=expected, got=f"({called})", where=where))
    return problems


def _noted(function: Callable[..., Any], where: str, table: str) -> Callable[..., Any]:
    """The function; what it raises gets a note that tells the table it was called for."""

    def call(*given: Any) -> Any:
        try:
            return function(*given)
        except ManyhandsError:
            raise
        except Exception as error:
            error.add_note(f"(raised by [{table}], {where})")
            raise

    return call


def _grouped(
    rest: Callable[..., Any], own: dict[int, Callable[..., Any] | None], document: Document[RecipeSchema]
) -> Callable[..., Any]:
    """The optimizer over param groups: the rest, then each group's own; and the groups with an optimizer of their own.

    A pattern must match a parameter.
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
                + ("" if groups[index].dimensions is None else f", with {groups[index].dimensions} dimensions"),
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
        made = [rest(shared)] if shared else []
        made += [make(members[index]) for index, make in own.items() if make is not None and members[index]]
        return made if own else made[0]

    return build
