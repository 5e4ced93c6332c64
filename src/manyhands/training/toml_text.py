"""TOML as text: at which line each value is written, values changed by `--set key=value`, and settings written back."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any

from manyhands.errors import ConfigError

Key = tuple[str | int, ...]  # where a value is: ("optimizer", "groups", 0, "match")


def line_numbers(text: str) -> dict[Key, int]:
    """The line at which each table and value of a valid TOML text begins.

    tomllib doesn't tell; but a statement is the shortest run of lines that is valid TOML by itself.
    """
    lines: dict[Key, int] = {}
    table: Key = ()
    last_index: dict[Key, int] = {}  # of each array of tables
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


def _header(parsed: dict[str, Any], last_index: dict[Key, int]) -> Key:
    """The key of `[a.b]` or `[[a.b]]`, parsed alone: inside arrays of tables it's that of the last table so far."""
    key: Key = ()
    value: Any = parsed
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key += (name,)
        if isinstance(value, list):
            last_index[key] = last_index.get(key, -1) + 1
        if key in last_index:
            key += (last_index[key],)
    return key


def _keys(value: Any, base: Key = ()) -> Iterator[Key]:
    entries: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for name, inner in entries:
        yield (*base, name)
        yield from _keys(inner, (*base, name))


def apply_override(override: str, values: dict[str, Any], origins: dict[Key, str]) -> ConfigError | None:
    """Put `key=value` into the values; returns what's wrong with it, if it can't be put there."""
    name, equals, written = override.partition("=")
    parts = [part.strip() for part in name.split(".")]
    origin = f"--set {override}"
    if not equals or not all(parts):
        return ConfigError(
            "an override can't be understood", where=origin, expected="key=value, such as batch.micro_size=2"
        )
    key: Key = ()
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
    """A TOML value; or Python's `.5` or `True`, which nobody means as text; or else a plain string."""
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


def dotted(key: Key) -> str:
    """`optimizer.groups.0.match`."""
    return ".".join(str(name) for name in key)


def to_toml(settings: dict[str, Any]) -> str:
    """Settings (of JSON's types) as TOML text: plain values first, then one table for each that is one."""
    plain = [f"{name} = {_toml_value(value)}\n" for name, value in settings.items() if not isinstance(value, dict)]
    tables = [
        f"\n[{name}]\n" + "".join(f"{_toml_key(inner)} = {_toml_value(value)}\n" for inner, value in table.items())
        for name, table in settings.items()
        if isinstance(table, dict)
    ]
    return "".join(plain + tables)


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(name)} = {_toml_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(inner) for inner in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if isinstance(value, float) else json.dumps(value)
