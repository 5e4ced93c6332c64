"""TOML with overrides and line numbers. Reports all problems in one error.

A file is parsed, changed by `--set key=value`, and validated by tables, which are pydantic models. Every value has an
origin (`recipe.toml:12`, or the `--set` that set it).
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from manyhands.errors import ConfigError, InvariantError
from manyhands.options import hint_nearest, nearest

KeyPath = tuple[str | int, ...]  # the path of a value: ("optimizer", "groups", 0, "match")


def line_numbers(text: str) -> dict[KeyPath, int]:
    """Return the line at which each table and value of a valid TOML text starts.

    tomllib does not report line numbers. So the text is divided into statements. A statement is the shortest sequence
    of lines that is valid TOML on its own.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    last_index: dict[KeyPath, int] = {}  # the index of the last table in each array of tables
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = _header(parsed, last_index)
            keys = [table[:length] for length in range(1, len(table) + 1)]
        else:
            keys = [table + key for key in _keys(parsed)]
        for key in keys:
            lines.setdefault(key, start)
        statement, start = "", number + 1
    return lines


def _header(parsed: dict[str, Any], last_index: dict[KeyPath, int]) -> KeyPath:
    """Return the key of the header `[a.b]` or `[[a.b]]`, including the index of the last table of each array."""
    key: KeyPath = ()
    value: Any = parsed
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key += (name,)
        if isinstance(value, list):
            last_index[key] = last_index.get(key, -1) + 1
        if key in last_index:
            key += (last_index[key],)
    return key


def _keys(value: Any, base: KeyPath = ()) -> Iterator[KeyPath]:
    entries: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for name, inner in entries:
        yield (*base, name)
        yield from _keys(inner, (*base, name))


def apply_override(override: str, values: dict[str, Any], origins: dict[KeyPath, str]) -> ConfigError | None:
    """Apply `key=value` to the values. Return an error if this is not possible."""
    name, equals, written = override.partition("=")
    parts = [part.strip() for part in name.split(".")]
    origin = f"--set {override}"
    if not equals or not all(parts):
        return ConfigError(
            "an override can't be parsed", where=origin, expected="key=value, such as batch.micro_size=2"
        )
    key: KeyPath = ()
    table: Any = values
    for position, part in enumerate(parts):
        step: Any = int(part) if isinstance(table, list) and part.isdecimal() else part
        if not isinstance(table, dict) and not (isinstance(table, list) and step in range(len(table))):
            return ConfigError(f"there is no {name.strip()}", where=origin, got=f"{dotted(key)} = {table!r}")
        key += (step,)
        if position == len(parts) - 1:
            table[step] = _override_value(written.strip())
            for old in [known for known in origins if known[: len(key)] == key]:
                del origins[old]
        elif isinstance(table, dict):
            table.setdefault(step, {})
        origins.setdefault(key, origin)
        table = table[step]
    return None


def _override_value(written: str) -> Any:
    """Parse a TOML value, or a Python number or boolean such as `.5` or `True`. Any other text is a string."""
    try:
        parsed = tomllib.loads(f"value = {written}")
        if parsed.keys() == {"value"}:
            return parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        literal = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return written
    return literal if isinstance(literal, int | float) else written


def parse_override(option: str, override: str) -> tuple[str, Any]:
    """Parse `key=value`, where the value is written as in TOML or Python.

    Raises ConfigError. option: the option that the error names.
    """
    name, equals, written = override.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise ConfigError("an override can't be parsed", where=f"{option} {override}", expected="key=value")
    return name.strip(), _override_value(written.strip())


def override_of(key: str, value: str | float) -> str:
    """Return the override that sets `key` to `value`. Strings that would be parsed as other values are quoted."""
    written = str(value)
    parsed = _override_value(written.strip())
    return f"{key}={written if parsed == value and type(parsed) is type(value) else json.dumps(value)}"


def dotted(key: KeyPath) -> str:
    """Return the key as text, such as `optimizer.groups.0.match`."""
    return ".".join(str(name) for name in key)


EXPECTED = {
    "model_type": "a table",
    "dict_type": "a table",
    "list_type": "an array",
    "invalid-json-value": "a string, number, boolean, array or table",
    "string_pattern_mismatch": 'an import path, "module:attribute"',
}

FOREIGN_FILES = ("pyproject.toml", "Cargo.toml")  # these are often in the folder of a recipe, but are never recipes


class Table(BaseModel):
    """A table of a file. Unknown fields are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


S = TypeVar("S", bound=Table)


@dataclass(frozen=True)
class Document(Generic[S]):
    """A validated file. origins: the origin of each value."""

    path: Path
    schema: S
    origins: dict[KeyPath, str]

    def origin(self, *key: str | int) -> str:
        """Return the origin of a value, or of the table that would contain it: `recipe.toml:12`, or `--set ...`."""
        return _origin(self.path, self.origins, key)

    def relocated(self, error: ConfigError) -> ConfigError:
        """Add the field's origin to a ConfigError of Batch, Strategy or Recipe.

        The error itself names only the field.
        """
        return _relocated(error, type(self.schema), self.path, self.origins)


def read_document(path: str | Path, overrides: Sequence[str], schema: type[S]) -> Document[S]:
    """Read and validate a file. Raises one ConfigError that lists all problems."""
    path = Path(path)
    text = _read_text(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        line = found[1] if found else str(text.rstrip().count("\n") + 1)  # the error is at the end of the document
        raise ConfigError(
            f"{path} is not TOML: {error}",
            where=f"{path}:{line}",
            expected="valid TOML (toml.io)",
            hint=f"run a Python script in several workers: manyhands run --workers N {path}"
            if path.suffix == ".py"
            else None,
        ) from None
    origins = {key: f"{path}:{line}" for key, line in line_numbers(text).items()}
    problems = [problem for override in overrides if (problem := apply_override(override, values, origins))]
    values.setdefault("name", path.stem)
    checked: S | None = None
    try:
        checked = schema.model_validate(values)
    except ValidationError as invalid:
        problems += [_problem(details, schema, values, path, origins) for details in invalid.errors()]
    raise_all(problems, path)
    if checked is None:
        raise InvariantError("a file is invalid, but no problem was found", where=str(path))
    return Document(path, checked, origins)


def raise_all(problems: Sequence[ConfigError], path: Path) -> None:
    """Raise the problem if there is one. If there are several, raise one error that lists them."""
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
        files = (*folder.glob("*.toml"), *folder.glob("*/*.toml"))
        near = sorted(str(file.relative_to(folder)) for file in files if file.name not in FOREIGN_FILES)
        if path.is_dir():
            run = "; this is a run directory, and the recipe comes first" if (path / "manifest.json").exists() else ""
            found = f"; recipes in this folder: {', '.join(str(path / file) for file in near[:5])}" if near else ""
            raise ConfigError(
                f"the recipe {path} can't be read",
                where=str(path.absolute()),
                expected="a TOML file",
                got="a folder",
                hint=f"name the file of the recipe{run}{found}",
            ) from None
        what = f"there is no recipe {path}" if not path.exists() else f"the recipe {path} can't be read"
        hint = hint_nearest(path.name, near) or (f"files in {folder}: {', '.join(near[:5])}, ..." if near else None)
        raise ConfigError(what, where=str(path.absolute()), got=error.strerror, hint=hint) from None


def _problem(
    details: ErrorDetails, schema: type[Table], values: dict[str, Any], path: Path, origins: dict[KeyPath, str]
) -> ConfigError:
    """Describe a problem that pydantic found."""
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return _relocated(cause, schema, path, origins, _real_key(details["loc"], values))
    key, field = _real_key(details["loc"], values), dotted(details["loc"])
    where = _origin(path, origins, key)
    if details["type"] == "missing":
        is_table = len(details["loc"]) == 1 and _table_named(field, schema)
        expected = f"a table, [{field}]" if is_table else f"{field} = ..."
        return ConfigError(f"{field} is missing", where=where, expected=expected)
    if details["type"] == "extra_forbidden":
        return ConfigError(
            f"{field} is not known", where=where, got=repr(details["input"]), hint=_unknown_hint(details["loc"], schema)
        )
    expected = EXPECTED.get(details["type"]) or re.sub(r"^(Input|String|List) should (be|have) ", "", details["msg"])
    return ConfigError(f"{dotted(key)} has a wrong value", where=where, expected=expected, got=repr(details["input"]))


def _unknown_hint(loc: KeyPath, schema: type[Table]) -> str | None:
    table, name = _table_at(loc, schema), str(loc[-1])
    if table is None:
        return None
    hint = nearest(name, table.model_fields)
    if len(loc) > 1 and name in schema.model_fields:
        if _table_named(name, schema):
            return f"[{name}] is a separate table"
        return f"{name} belongs at the top of the file, above the first [table]"
    if "arguments" in table.model_fields and not hint.startswith("did"):
        return f"{hint}; arguments of the function go into {dotted((*loc[:-1], 'arguments'))}"
    return hint


def _table_at(loc: KeyPath, schema: type[Table]) -> type[Table] | None:
    """Return the table that contains, or should contain, the last name of a key."""
    table: type[Table] | None = schema
    for name in loc[:-1]:
        if isinstance(name, str) and table is not None:
            table = _table_named(name, table)
    return table


def _table_named(name: str, outer: type[Table]) -> type[Table] | None:
    """Return the table class of a field or of its items, or None if they are not tables."""
    field = outer.model_fields.get(name)
    annotation = field.annotation if field else None
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Table)), None)


def _real_key(loc: KeyPath, values: Any) -> KeyPath:
    """Return the part of pydantic's location that exists in `values`, because pydantic also names types and missing
    keys.
    """
    key: KeyPath = ()
    name: Any
    for name in loc:
        if (isinstance(values, dict) and name in values) or (isinstance(values, list) and isinstance(name, int)):
            values = values[name]
            key += (name,)
    return key


def _relocated(
    error: ConfigError, schema: type[Table], path: Path, origins: dict[KeyPath, str], found_at: KeyPath = ()
) -> ConfigError:
    """Return the error with the file and line of the field that it names, or else of the value where it was found."""
    what = error.what.removeprefix("recipe.")
    tables = "|".join(name for name in schema.model_fields if _table_named(name, schema))
    named = re.search(rf"\b(?:recipe|({tables}))\.(\w+)", error.what)
    key: KeyPath = tuple(part for part in named.groups() if part) if named else found_at
    where = _origin(path, origins, key)
    return ConfigError(what, expected=error.expected, got=error.got, where=where, hint=error.hint, detail=error.detail)


def _origin(path: Path, origins: dict[KeyPath, str], key: KeyPath) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return f"{path}:1"  # the table does not exist
