"""Functions that a file names by path, with the arguments of a table."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, JsonValue

from manyhands.documents.toml import Document, KeyPath, Table, dotted
from manyhands.errors import ConfigError, ManyhandsError
from manyhands.options import hint_nearest

Arguments = dict[str, JsonValue]

IMPORT_PATH = r"^\w+(\.\w+)*:\w+(\.\w+)*$"


NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


class Target(Table):
    """An object to import, and to call with `arguments`."""

    path: str = Field(pattern=IMPORT_PATH)
    arguments: Arguments = Field(default_factory=dict)

    def further_arguments(self) -> Iterator[tuple[int, Arguments]]:
        """Yield the (index, arguments) of each group whose arguments are passed to the same function."""
        yield from ()


class Named(Protocol):
    """A table with the path of a function, and its arguments."""

    @property
    def path(self) -> str | None:
        """Return the path, `module:attribute`."""

    @property
    def arguments(self) -> Arguments:
        """Return the arguments by name."""

    def further_arguments(self) -> Iterator[tuple[int, Arguments]]:
        """Yield the (index, arguments) of each group whose arguments are passed to the same function."""


class Binder:
    """Imports the functions of a file and binds their arguments. problems: all errors so far.

    Inserts the file's folder at the front of sys.path, where it stays.
    """

    def __init__(self, document: Document[Any]) -> None:
        self._document, self._folder = document, document.path.absolute().parent
        if sys.path[:1] != [str(self._folder)]:
            sys.path.insert(0, str(self._folder))
        importlib.invalidate_caches()
        self.problems: list[ConfigError] = []

    def bind(
        self, target: Named, called_with: Sequence[str], *key: str | int, noted: bool = True
    ) -> Callable[..., Any]:
        """Return the function with its arguments bound.

        called_with: the names of the positional arguments that come before the table's. key: the key of the table.
        noted: if True, add a note that names the table to the function's errors. After an error, the result can't be
        used.
        """
        try:
            function = find_function(str(target.path), self._folder)
        except ConfigError as error:
            self._add_problem(error, *key)
            return _unusable
        self.problems.extend(_argument_problems(key, function, target, called_with, self._document))
        bound = functools.partial(function, **target.arguments)
        return _with_note(bound, self._document.origin(*key), str(key[0])) if noted else bound

    def bind_or_make(self, target: Named, called_with: Sequence[str], *key: str | int) -> Any:
        """Return a function with its arguments bound, an object of the class that the path names, or the object itself.

        Takes the arguments of `bind`. After an error, the result can't be used.
        """
        try:
            found = find_object(str(target.path), self._folder)
        except ConfigError as error:
            self._add_problem(error, *key)
            return _unusable
        if isinstance(found, type):
            make, before = self.bind(target, (), *key), len(self.problems)
            return make() if before == 0 else _unusable
        if callable(found) and not hasattr(found, "_reductions"):  # an object of torchmetrics is callable
            return self.bind(target, called_with, *key, noted=False)
        if target.arguments:
            self._add_problem(ConfigError(f"{target.path} is an object, which takes no arguments"), *key)
        return found

    def _add_problem(self, error: ConfigError, *key: str | int) -> None:
        error.what, error.where = f"{dotted(key)}.path: {error.what}", self._document.origin(*key, "path")
        self.problems.append(error)


def _unusable(*_: object) -> None:
    """Stand for a function that could not be imported."""


def find_function(path: str, folder: Path) -> Callable[..., Any]:
    """Import the function that `module:attribute` names. Raises a ConfigError that does not name the file and line."""
    found = find_object(path, folder)
    if not callable(found):
        raise ConfigError(
            f"{path} can't be called",
            expected="a function or a class",
            got=f"an object of the class {type(found).__name__}",
            hint="write a function that returns this object, and name the function",
        )
    return found  # type: ignore[no-any-return]


def find_object(path: str, folder: Path) -> Any:
    """Import the object that `module:attribute` names. Raises a ConfigError that does not name the file and line."""
    module_name, _, attribute = path.partition(":")
    found: Any = _import(module_name, folder)
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [known for known in dir(found) if not known.startswith("_")]
            owner = getattr(found, "__name__", path)
            raise no_attribute(owner, name, path, public)
        found = getattr(found, name)
    return found


def no_attribute(owner: str, name: str, path: str, known: Sequence[str]) -> ConfigError:
    """Return the error about a path that names an attribute which its owner lacks."""
    hint = hint_nearest(name, known)
    return ConfigError(f"{owner} has no {name}", expected="module:attribute", got=repr(path), hint=hint)


def no_module(missing: str, name: str, folder: Path, search: Sequence[str]) -> ConfigError:
    """Return the error for the module `name` if `missing`, which is this module or a parent of it, doesn't exist.

    search: the folders in which similar names are looked for.
    """
    hint = hint_nearest(missing.rpartition(".")[2], [found.name for found in pkgutil.iter_modules(search)])
    expected = f"a module in {folder}, or an installed module"
    return ConfigError(f"there is no module {missing}", expected=expected, got=repr(name), hint=hint)


def _import(name: str, folder: Path) -> Any:
    try:
        module = importlib.import_module(name)
    except ManyhandsError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            parent = missing.rpartition(".")[0]
            search = getattr(sys.modules.get(parent), "__path__", ()) if parent else [str(folder)]
            raise no_module(missing, name, folder, search) from None
        raise import_failed(name, error) from error
    except Exception as error:  # the user's module may raise anything
        raise import_failed(name, error) from error
    _check_not_another(name, folder)
    return module


def import_failed(name: str, error: Exception) -> ConfigError:
    """Return the error about a module whose import raises an exception."""
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
    key: KeyPath, function: Callable[..., Any], target: Named, called_with: Sequence[str], document: Document[Any]
) -> list[ConfigError]:
    """Return an error for each unknown or missing argument of a function. key: the key of the function's table."""
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

    tables = [((*key, "arguments"), target.arguments)]
    tables += [((*key, "groups", index, "arguments"), arguments) for index, arguments in target.further_arguments()]
    for inner, arguments in tables:
        for name in arguments:
            if name not in takes and not takes_any:
                what = f"{dotted(inner)}.{name}: {target.path} takes no {name}"
                hint = hint_nearest(name, takes[len(called_with) :])
                problems.append(ConfigError(what, expected=expected, where=document.origin(*inner, name), hint=hint))
    try:
        known = {name: value for name, value in target.arguments.items() if name in takes or takes_any}
        signature.bind(*called_with, **known)
    except TypeError as error:
        called = ", ".join([*called_with, *(f"{name}=..." for name in known)])
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
