"""Hashes of functions and values, which name stages.

Functions are known by their code, defaults, the values that they close over and the functions and values of their own
package that they use; where they stand in a file doesn't matter. A function of another package is known by its name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from manyhands.errors import ConfigError


def fingerprint_code(value: Any) -> str:
    """64 hex digits that stand for a value: plain data, functions, classes, dataclasses, all that can be pickled.

    Raises ConfigError for what can't be pickled.
    """
    return _Fingerprint(_package_of(value)).of(value)


def _package_of(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").split(".")[0]


class _Fingerprint:
    """One walk. `seen`: objects on the way to the one at hand, so that recursive functions end."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._seen: dict[int, int] = {}

    def of(self, value: Any) -> str:
        if id(value) in self._seen:
            return f"seen {self._seen[id(value)]}"
        if value is None or isinstance(value, (bool, int, float, str, bytes, complex)):
            return _hash(type(value).__name__, repr(value))
        self._seen[id(value)] = len(self._seen)
        try:
            return self._of_object(value)
        finally:
            del self._seen[id(value)]

    def _of_object(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return _hash("dict", *(part for pair in value.items() for part in map(self.of, pair)))
        if isinstance(value, (set, frozenset)):
            return _hash("set", *sorted(map(self.of, value)))
        if isinstance(value, (list, tuple)):
            return _hash(type(value).__name__, *map(self.of, value))
        if isinstance(value, types.CodeType):
            return self._of_code(value)
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return _hash("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            return _hash("partial", self.of(value.func), self.of(value.args), self.of(value.keywords))
        if isinstance(value, types.ModuleType):
            return self._of_module(value)
        if isinstance(value, type):
            return self._of_class(value)
        if dataclasses.is_dataclass(value):
            fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
            return _hash("dataclass", self.of(type(value)), self.of(fields))
        if hasattr(value, "__qualname__"):  # a function or method of C
            return _hash("named", _name(value))
        return _hash("object", hashlib.sha256(pickled(value)).hexdigest())

    def _of_code(self, code: types.CodeType) -> str:
        constants = self.of(code.co_consts)
        names = (*code.co_names, "|", *code.co_varnames, "|", *code.co_freevars)
        return _hash("code", code.co_code.hex(), constants, *names)

    def _of_function(self, function: types.FunctionType) -> str:
        package = _package_of(function)
        if (
            package not in (self._package, "__main__")
            and package != "manyhands"
            and is_installed(function.__code__.co_filename)
        ):
            return _hash("function", _name(function))
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        used = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
        return _hash(
            "function",
            self.of(function.__code__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            self.of(cells),
            *(part for name in sorted(used) for part in (name, self.of(used[name]))),
        )

    def _of_module(self, module: types.ModuleType) -> str:
        """By its name, if it was installed; else by its source, too: what of it is used isn't known."""
        file = getattr(module, "__file__", None)
        if file is None or _package_of(module) == "manyhands" or is_installed(file):
            return _hash("module", module.__name__)
        try:
            return _hash("module", module.__name__, hashlib.sha256(Path(file).read_bytes()).hexdigest())
        except OSError:
            return _hash("module", module.__name__)

    def _of_class(self, kind: type) -> str:
        if kind.__module__ == "builtins" or _package_of(kind) not in (self._package, "__main__"):
            return _hash("class", _name(kind))
        own = {"__dict__", "__weakref__", "_abc_impl"}  # and what Python and dataclass note of the class beside it
        members = {
            name: _function_of(member)
            for name, member in sorted(vars(kind).items())
            if name not in own and (callable(member) or not name.startswith("__"))
        }
        parts = (part for name, member in members.items() for part in (name, self.of(member)))
        return _hash("class", _name(kind), *map(self.of, kind.__bases__), *parts)


def pickled(value: Any) -> bytes:
    """By cloudpickle, so that lambdas and what a notebook or script defines travel, too. Raises ConfigError."""
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise ConfigError(
            f"a function of the job can't be sent to the workers: {type(error).__name__}: {error}",
            got=repr(value)[:200],
            hint="it, or what it uses, holds something that belongs to this process (a lock, an open file, "
            "a connection): make that inside the function",
        ) from error


def _function_of(member: Any) -> Any:
    """What a member of a class does: the function behind a property, a class method or a static one."""
    if isinstance(member, property):
        return (member.fget, member.fset, member.fdel)
    if isinstance(member, functools.cached_property):
        return member.func
    if isinstance(member, (classmethod, staticmethod)):
        return member.__func__
    return _name(member) if isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)) else member


def _names(code: types.CodeType) -> Iterable[str]:
    """The global names that code uses, also inside functions that it defines."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= set(_names(constant))
    return sorted(names)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def is_installed(file: str) -> bool:
    """What is defined in it comes with Python or was installed, so that its version says what it does."""
    return "site-packages" in file or "/lib/python" in file


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()
