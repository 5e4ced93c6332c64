"""Hashes of functions and values. Stages are named by such hashes.

The fingerprint of a function covers its code, its defaults, the values that it closes over, and the functions and
values of its own package that it uses. Its position in the file does not matter. An installed function of another
package is identified by its name.
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
    """Return a hash of a value as 64 hex digits.

    Accepts plain data, functions, classes, dataclasses, and other objects that can be pickled. Raises ConfigError for
    an object that can't be pickled.
    """
    return _Fingerprint(_package_of(value)).of(value)


def _package_of(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").split(".")[0]


class _Fingerprint:
    """Recursive hash of one value."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._ancestors: dict[int, int] = {}  # id and depth of each object being hashed; stops endless recursion

    def of(self, value: Any) -> str:
        if id(value) in self._ancestors:
            return f"seen {self._ancestors[id(value)]}"
        if value is None or isinstance(value, (bool, int, float, str, bytes, complex)):
            return _hash(type(value).__name__, repr(value))
        self._ancestors[id(value)] = len(self._ancestors)
        try:
            return self._of_object(value)
        finally:
            del self._ancestors[id(value)]

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
        if hasattr(value, "__qualname__"):  # a function or method implemented in C
            return _hash("named", _name(value))
        return _hash("object", hashlib.sha256(pickled(value)).hexdigest())

    def _of_code(self, code: types.CodeType) -> str:
        constants = self.of(code.co_consts)
        names = (*code.co_names, "|", *code.co_varnames, "|", *code.co_freevars)
        return _hash("code", code.co_code.hex(), constants, *names)

    def _of_function(self, function: types.FunctionType) -> str:
        package = _package_of(function)
        hashed_by_code = package in (self._package, "__main__", "manyhands")
        if not hashed_by_code and is_installed(function.__code__.co_filename):
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
        """Hash an installed module by its name, and any other by its name and source.

        The complete source counts, because it isn't known which parts of the module are used.
        """
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
        # These internal attributes of Python and abc do not affect behaviour, and may differ between processes.
        ignored = {"__dict__", "__weakref__", "_abc_impl"}
        members = {
            name: _implementation_of(member)
            for name, member in sorted(vars(kind).items())
            if name not in ignored and (callable(member) or not name.startswith("__"))
        }
        parts = (part for name, member in members.items() for part in (name, self.of(member)))
        return _hash("class", _name(kind), *map(self.of, kind.__bases__), *parts)


def pickled(value: Any) -> bytes:
    """Pickle a value with cloudpickle, which also supports lambdas and definitions of a script or notebook.

    Raises ConfigError if the value can't be pickled.
    """
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise ConfigError(
            f"a function of the job can't be sent to the workers: {type(error).__name__}: {error}",
            got=repr(value)[:200],
            hint="the function, or an object that it uses, holds something that can't leave this process (a lock, an "
            "open file, a connection): create it inside the function",
        ) from error


def _implementation_of(member: Any) -> Any:
    """Return the functions behind a property, class method or static method; any other member as it is.

    Slots and C descriptors are represented by their names.
    """
    if isinstance(member, property):
        return (member.fget, member.fset, member.fdel)
    if isinstance(member, functools.cached_property):
        return member.func
    if isinstance(member, (classmethod, staticmethod)):
        return member.__func__
    return _name(member) if isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)) else member


def _names(code: types.CodeType) -> Iterable[str]:
    """Return the global names that the code and its nested functions use, sorted."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= set(_names(constant))
    return sorted(names)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # the variable has no value yet
        return False
    return True


def is_installed(file: str) -> bool:
    """True if the file belongs to Python or an installed package, whose code changes only with its version."""
    return "site-packages" in file or "/lib/python" in file


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data) + data)  # includes the length, so that ("ab", "c") and ("a", "bc") differ
    return digest.hexdigest()
