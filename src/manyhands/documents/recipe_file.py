"""Recipe files: tables, imports and checks of arguments.

    [model]
    path = "gpt:GPT"              # module:attribute; the file's own folder is searched first
    arguments = { depth = 4 }

`check_recipe` validates a file; it imports neither the user's code nor torch. `load_recipe` also imports the objects
that the paths name, and checks the arguments against the signatures of these objects. So errors are reported with file
and line before anything is built.
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

from pydantic import Field, JsonValue, model_validator

from manyhands.config import Batch, Recipe, Strategy, Weights
from manyhands.documents.option_table import BuildableTable, OptionTable
from manyhands.documents.toml import Document, KeyPath, Table, dotted, raise_all, read_document
from manyhands.errors import ConfigError, ManyhandsError
from manyhands.options import hint_nearest

if TYPE_CHECKING:
    from torch import nn

Arguments = dict[str, JsonValue]

IMPORT_PATH = r"^\w+(\.\w+)*:\w+(\.\w+)*$"


class Target(Table):
    """An object to import, and to call with `arguments`."""

    path: str = Field(pattern=IMPORT_PATH)
    arguments: Arguments = {}


class GroupTable(Table):
    """Parameters whose names match a pattern in `match`, and the optimizer's arguments for them.

    dimensions: only parameters with this number of dimensions match. path: an optimizer for these parameters alone.
    """

    match: list[str] = Field(min_length=1)
    dimensions: int | None = Field(default=None, ge=0)
    path: str | None = Field(default=None, pattern=IMPORT_PATH)
    arguments: Arguments = {}


class OptimizerTable(Target):
    """The optimizer and its param groups. A parameter belongs to the first group that matches."""

    groups: list[GroupTable] = []


class WeightsTable(BuildableTable[Weights]):
    """The options of `manyhands.Weights`, or only its path."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


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

NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A loaded recipe file.

    steps: the number of steps, if the file sets it. settings: the recipe as used, with defaults and overrides, as JSON
    values.
    """

    recipe: Recipe
    strategy: Strategy
    steps: int | None
    settings: dict[str, Any]


def check_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeSchema:
    """Read and validate a recipe file. Imports neither torch nor anything that the file names.

    overrides: `key=value` with dotted keys, such as "optimizer.arguments.lr=1e-3".
    Raises one ConfigError that lists all problems, each with file and line.
    """
    return read_document(path, overrides, RecipeSchema).schema


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read a recipe file, import the objects that it names, and create its data set. The model is built later.

    Inserts the file's folder at the front of sys.path, where it stays, because data sets and models may import later.
    Raises one ConfigError that lists all problems, each with file and line. Errors from the data set are not converted.
    """
    document = read_document(path, overrides, RecipeSchema)
    functions = _import_all(document)
    data = functions["data"]()
    schema, weights = document.schema, _weights(document)
    try:
        recipe = Recipe(
            **functions | {"data": data},
            **schema.option_values(),
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
    return RecipeFile(
        recipe=recipe,
        strategy=schema.strategy.build(),
        steps=schema.steps,
        settings=settings,
    )


def _weights(document: Document[RecipeSchema]) -> Weights | None:
    """Return the initial weights.

    The path is relative to the recipe's folder, or to the working directory if an override set it.
    """
    table = document.schema.weights
    overridden = document.origin("weights", "path").startswith("--set")
    if table is None:
        return None
    folder = Path() if overridden else document.path.parent
    return table.build(path=folder.absolute() / table.path)


def _import_all(document: Document[RecipeSchema]) -> dict[str, Callable[..., Any]]:
    """Return the recipe's functions by table, with their arguments bound. Raises one ConfigError for all problems."""
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
        return bound if table in ("loss", "collate", "sample") else _with_note(bound, document.origin(*key), table)

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
    """Import the object that `module:attribute` names. Raises a ConfigError that does not name the file and line."""
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
            expected = f"a module in {folder}, or an installed module"
            raise ConfigError(f"there is no module {missing}", expected=expected, got=repr(name), hint=hint) from None
        raise _import_failed(name, error) from error
    except Exception as error:  # the user's module may raise anything
        raise _import_failed(name, error) from error
    _check_not_another(name, folder)
    return module


def _import_failed(name: str, error: Exception) -> ConfigError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
    at = (
        f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    )  # without frames, for example after a syntax error, the message names the file and line
    return ConfigError(f"module {name} can't be imported", got=f"{type(error).__name__}: {error}{at}")


def _check_not_another(name: str, folder: Path) -> None:
    """Refuse a module of the same name that was imported from elsewhere, because Python imports a name once per
    process.
    """
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
    """Return an error for each unknown or missing argument of a function. key: the key of the function's table."""
    table = str(key[0])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
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


def _with_note(function: Callable[..., Any], where: str, table: str) -> Callable[..., Any]:
    """Wrap `function` so that a note on its errors names the table."""

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
