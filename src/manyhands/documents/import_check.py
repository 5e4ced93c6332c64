"""Looks for the modules and functions that a file names, without importing them, to find wrong names immediately.

Workers import torch before they import what the file names, which takes seconds. What can't be decided without an
import, such as an attribute of an installed module, is left to them.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from manyhands.documents.functions import IMPORT_PATH, import_failed, no_attribute, no_module
from manyhands.documents.toml import Document, KeyPath, dotted, raise_all
from manyhands.errors import ConfigError

_NAMES_AT_RUN_TIME = {"__getattr__", "exec", "eval", "globals", "setattr", "vars", "locals"}


def check_imports(document: Document[Any]) -> None:
    """Raise one ConfigError that lists the paths `module:attribute` of a file that are certain to fail."""
    folder, problems = document.path.absolute().parent, []
    for key, path in _import_paths(document.schema.model_dump(exclude={"weights", "strategy"})):
        error = _problem(path, folder)
        if error is not None:
            error.what, error.where = f"{dotted(key)}: {error.what}", document.origin(*key)
            problems.append(error)
    raise_all(problems, document.path)


def _import_paths(value: Any, key: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the import paths in the values of a file, with their keys.

    Arguments are left out, because only the functions know what they mean.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "arguments":
                yield from _import_paths(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _import_paths(inner, (*key, index))
    elif isinstance(value, str) and (key[-1] == "path" or "metrics" in key) and re.match(IMPORT_PATH, value):
        yield key, value


def _problem(path: str, folder: Path) -> ConfigError | None:
    module, _, attribute = path.partition(":")
    top, *rest = module.split(".")
    if not _exists(top, folder):
        return no_module(top, module, folder, [str(folder)])
    file = folder / f"{top}.py"
    if not file.is_file() or (folder / top / "__init__.py").exists():
        return None
    if rest:
        return no_module(f"{top}.{rest[0]}", module, folder, [])
    try:
        names = _names_in(compile(file.read_bytes(), str(file), "exec", ast.PyCF_ONLY_AST))
    except SyntaxError as error:
        return import_failed(module, error)
    except (OSError, ValueError):
        return None
    first = attribute.partition(".")[0]
    known = first.startswith("__") or names is None or first in names
    return None if known else no_attribute(module, first, path, sorted(names or ()))


def _exists(top: str, folder: Path) -> bool:
    """Return True if a module of this name can be found, in the file's folder, the working directory, or installed."""
    try:
        return PathFinder.find_spec(top, [str(folder), os.getcwd()]) is not None or (
            importlib.util.find_spec(top) is not None
        )
    except (ImportError, ValueError, OSError):  # raised by a finder of the user's, or for a module without a spec
        return True


def _names_in(tree: ast.AST) -> set[str] | None:
    """Return all names that a module may have, or None if they can't be known without executing the module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    return None if "*" in names or names & _NAMES_AT_RUN_TIME else names
