"""A recipe file's text and its check: TOML, overrides, tables. Imports neither the user's code nor torch.

Every value keeps its origin (`recipe.toml:12`, or the `--set` that gave it), and all problems come out in one error.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ValidationInfo

from manyhands.config import Batch, Recipe, Strategy, Weights, hint_nearest, nearest
from manyhands.errors import ConfigError
from manyhands.training.toml_text import Key, apply_override, dotted, line_numbers

Arguments = dict[str, JsonValue]

PLAIN_FIELDS = ("seed", "precision", "device", "clip_norm", "compile", "threads_per_worker", "optimizer_kind")
IMPORT_PATH = r"^\w+(\.\w+)*:\w+(\.\w+)*$"

EXPECTED = {
    "model_type": "a table",
    "dict_type": "a table",
    "list_type": "an array",
    "invalid-json-value": "a string, number, boolean, array or table",
    "string_pattern_mismatch": 'an import path, "module:attribute"',
}


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Target(_Table):
    """Something that is imported and called with `arguments`."""

    path: str = Field(pattern=IMPORT_PATH)
    arguments: Arguments = {}


class GroupTable(_Table):
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


class WeightsTable(_Table):
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


class BatchTable(_Table):
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


class StrategyTable(_Table):
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


class RecipeSchema(_Table):
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


@dataclass(frozen=True)
class Document:
    """A recipe file that was read and checked. `origins` tells where each value comes from."""

    path: Path
    schema: RecipeSchema
    origins: dict[Key, str]

    def origin(self, *key: str | int) -> str:
        """`recipe.toml:12`, or `--set ...`: of a value, or else of the table it would be in."""
        return _origin(self.path, self.origins, key)

    def relocated(self, error: ConfigError) -> ConfigError:
        """A ConfigError of Batch, Strategy or Recipe, which tells the field only, with the field's origin."""
        return _relocated(error, self.path, self.origins)


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read and check a recipe file. Raises one ConfigError that tells all problems."""
    path = Path(path)
    text = _read_text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        line = found[1] if found else str(text.rstrip().count("\n") + 1)  # "at end of document"
        raise ConfigError(
            f"{path} is not TOML: {error}", where=f"{path}:{line}", expected="valid TOML (toml.io)"
        ) from None
    origins = {key: f"{path}:{line}" for key, line in line_numbers(text).items()}
    problems = [problem for override in overrides if (problem := apply_override(override, values, origins))]
    values.setdefault("name", path.stem)
    try:
        schema = RecipeSchema.model_validate(values)
    except ValidationError as invalid:
        problems += [_problem(details, values, path, origins) for details in invalid.errors()]
    raise_all(problems, path)
    return Document(path, schema, origins)


def raise_all(problems: Sequence[ConfigError], path: Path) -> None:
    """Raise the only problem, or one error that lists them all; nothing if there are none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(f"{len(problems)} problems in {path}", detail="\n".join(str(problem) for problem in problems))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} is not UTF-8 text", where=f"{path}:{line}", got=str(error)) from None
    except OSError as error:
        folder = path if path.is_dir() else path.parent
        near = sorted(str(file.relative_to(folder)) for file in (*folder.glob("*.toml"), *folder.glob("*/*.toml")))
        what = f"there is no recipe {path}" if not path.exists() else f"the recipe {path} can't be read"
        hint = hint_nearest(path.name, near) or (f"in {folder} there are {', '.join(near[:5])}, ..." if near else None)
        raise ConfigError(what, where=str(path.absolute()), got=error.strerror, hint=hint) from None


def _problem(details: ErrorDetails, values: dict[str, Any], path: Path, origins: dict[Key, str]) -> ConfigError:
    """What pydantic found, in our words."""
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return _relocated(cause, path, origins)
    key, field = _real_key(details["loc"], values), dotted(details["loc"])
    where = _origin(path, origins, key)
    if details["type"] == "missing":
        is_table = len(details["loc"]) == 1 and _table_named(field, RecipeSchema)
        expected = f"a table, [{field}]" if is_table else f"{field} = ..."
        return ConfigError(f"{field} is missing", where=where, expected=expected)
    if details["type"] == "extra_forbidden":
        return ConfigError(
            f"{field} is not known", where=where, got=repr(details["input"]), hint=_unknown_hint(details["loc"])
        )
    expected = EXPECTED.get(details["type"]) or re.sub(r"^(Input|String|List) should (be|have) ", "", details["msg"])
    return ConfigError(f"{dotted(key)} has a wrong value", where=where, expected=expected, got=repr(details["input"]))


def _unknown_hint(loc: Key) -> str | None:
    table, name = _table_at(loc), str(loc[-1])
    if table is None:
        return None
    hint = nearest(name, table.model_fields)
    if len(loc) > 1 and name in RecipeSchema.model_fields:
        if _table_named(name, RecipeSchema):
            return f"[{name}] is a table of its own"
        return f"{name} belongs at the top of the file, above the first [table]"
    if "arguments" in table.model_fields and not hint.startswith("did"):
        return f"{hint}; what is passed on goes into {dotted((*loc[:-1], 'arguments'))}"
    return hint


def _table_at(loc: Key) -> type[_Table] | None:
    """The table that a key's last name is (or should have been) in."""
    table: type[_Table] | None = RecipeSchema
    for name in loc[:-1]:
        if isinstance(name, str) and table is not None:
            table = _table_named(name, table)
    return table


def _table_named(name: str, outer: type[_Table]) -> type[_Table] | None:
    """The table that may be given under a name (once, or in an array), if it's a table that may be."""
    field = outer.model_fields.get(name)
    annotation = field.annotation if field else None
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, _Table)), None)


def _real_key(loc: Key, values: Any) -> Key:
    """pydantic puts names of types between a nested value's keys, and names what's missing: keep what's there."""
    key: Key = ()
    name: Any
    for name in loc:
        if (isinstance(values, dict) and name in values) or (isinstance(values, list) and isinstance(name, int)):
            values = values[name]
            key += (name,)
    return key


def _relocated(error: ConfigError, path: Path, origins: dict[Key, str]) -> ConfigError:
    what = error.what.removeprefix("recipe.")
    named = re.search(r"\b(?:recipe|(batch|strategy|weights))\.(\w+)", error.what)
    key: Key = tuple(part for part in named.groups() if part) if named else ()
    where = _origin(path, origins, key)
    return ConfigError(what, expected=error.expected, got=error.got, where=where, hint=error.hint, detail=error.detail)


def _origin(path: Path, origins: dict[Key, str], key: Key) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return f"{path}:1"  # a table that isn't there at all
