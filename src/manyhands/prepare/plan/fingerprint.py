"""Hashes functions and values. The hashes are the names of stages.

The fingerprint of a function covers its code, its defaults, the values that it closes over, the global values that it
uses, and the code and values that these use in turn. The position of the function in the file does not matter. A class
is identified by its members and bases, an object by its class and state, and a module by its code and the code of the
modules that it imports. An installed package is identified by its name and version.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import sys
import types
import typing
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

from manyhands.errors import ConfigError
from manyhands.prepare.plan.code import ATOMS, globals_in, hash_atom, hash_code, hash_of, imports_in, names_in
from manyhands.prepare.plan.modules import LocalModules, is_importable, is_installed
from manyhands.prepare.records.pickling import NotPicklable, cant_be_pickled, reduced

_LARGE = 4096
"""Values of at least this many bytes are hashed without their `repr`, which takes up to four times the memory."""

_IN_C = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)

_SEARCHING: tuple[Any, ...] = (eval, exec, globals, __import__, importlib.import_module)
"""Functions that use code that their caller's code does not name."""

_DERIVED = {
    "__dict__",
    "__firstlineno__",
    "__module__",
    "__signature__",
    "__slotnames__",
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
}
"""Members that Python derives from others, or that differ between processes."""

_KEPT_BY_PYDANTIC = "__pydantic_fields__"
"""The other members whose names start with `__pydantic_` are derived from this member, and contain addresses."""

_CACHED = type(functools.cache(len))

_TYPE_VARIABLES = (typing.TypeVar, typing.ParamSpec, typing.TypeVarTuple)

_DEEPEST = 60
"""Functions and objects at this depth are hashed later."""

_MOST_IN_SETS = 10_000

_NO_DEPTH = sys.maxsize


def fingerprint_code(value: Any) -> str:
    """Return a hash of a value as 64 hex digits.

    Accepts plain data, functions, classes, modules, and other objects that can be pickled. Raises ConfigError for
    an object that can't be pickled, and for a function whose code computes the names of what it uses, if the function
    has no file.
    """
    try:
        return _Fingerprint(LocalModules()).of_all(value)
    except RecursionError as error:
        raise cant_be_pickled(value, error) from error


class _Fingerprint:
    """A recursive hash of one value.

    The hash of a value is a hash of its parts. A value may be a part of itself, as a recursive function is, or a class
    whose methods use it. A part that contains itself is represented by its depth. If a value's hash does not refer to a
    value above it, the value is hashed once. Otherwise the value belongs to a cycle. Until the complete cycle is
    hashed, further occurrences of the value are represented by the number of the first occurrence. So the time is
    proportional to the number of values. Values that are reached through very many other values are hashed at the end,
    because Python limits the depth of calls.
    """

    def __init__(self, modules: LocalModules, open_sets: frozenset[int] = frozenset(), in_sets: Any = None) -> None:
        self._modules, self._open_sets = modules, open_sets
        # The number of objects in nested sets, counted over all parts together.
        self._in_sets: list[int] = in_sets or [0]
        self._open: dict[int, int] = {}  # id and depth of each object that is being hashed
        self._hashes: dict[int, str] = {}
        self._in_cycle: dict[int, tuple[int, int]] = {}  # id: number, and the lowest depth that its hash refers to
        self._kept: list[Any] = []  # the objects whose ids are in use, which must not be freed
        self._later: dict[int, Any] = {}
        self._count = 0
        self._lowest = _NO_DEPTH

    def of_all(self, value: Any) -> str:
        """Return the hash of a value, including the parts of it that were left for later."""
        parts = [self.of(value)]
        while len(parts) <= len(self._later):
            parts.append(self.of(list(self._later.values())[len(parts) - 1]))
        return parts[0] if len(parts) == 1 else hash_of("deep", *parts)

    def of(self, value: Any) -> str:
        """Return the hash of a value."""
        kind, key = type(value), id(value)
        if kind in ATOMS:
            if kind is bytes and len(value) > _LARGE:
                return hash_of("large bytes", hashlib.sha256(value).hexdigest())
            return hash_atom(value)
        if key in self._open:
            self._lowest = min(self._lowest, self._open[key])
            return f"seen {self._open[key]}"
        # These hashes are not stored, because there may be millions of records, which are rarely shared.
        if kind in _PLAIN:
            self._open[key] = len(self._open)
            try:
                return _PLAIN[kind](self, value)
            finally:
                del self._open[key]
        if key in self._hashes:
            return self._hashes[key]
        if key in self._in_cycle:
            number, lowest = self._in_cycle[key]
            self._lowest = min(self._lowest, lowest)
            return f"again {number}"
        if len(self._open) >= _DEEPEST:
            self._later.setdefault(key, value)
            return f"later {list(self._later).index(key)}"
        return self._of_new(value)

    def _of_new(self, value: Any) -> str:
        if len(self._open_sets) > 2:
            self._count_in_sets()
        key, depth, before = id(value), len(self._open), len(self._in_cycle)
        outer, self._lowest = self._lowest, _NO_DEPTH
        self._open[key] = depth
        self._count += 1
        number = self._count
        try:
            result = self._of_object(value)
            lowest = self._lowest
        except BaseException:
            lowest = _NO_DEPTH
            raise
        finally:
            del self._open[key]
            self._lowest = outer
            while lowest >= depth and len(self._in_cycle) > before:  # a cycle is complete
                self._in_cycle.popitem()
        self._kept.append(value)
        if lowest < depth:
            self._in_cycle[key] = (number, lowest)
            self._lowest = min(outer, lowest)
        else:
            self._hashes[key] = result
        return result

    def _count_in_sets(self) -> None:
        """Raise ConfigError for a large graph whose edges are sets.

        Sets have no order, so each path would have to be hashed.
        """
        self._in_sets[0] += 1
        if self._in_sets[0] > _MOST_IN_SETS:
            raise ConfigError(
                "a function of the job uses sets of objects that contain more sets",
                got=f"more than {_MOST_IN_SETS} objects in such sets",
                hint="use lists or dicts in these objects, because the order of sets differs between runs",
            )

    def _of_object(self, value: Any) -> str:
        for kinds, of_kind in _KINDS:
            if isinstance(value, kinds):
                return of_kind(self, value)
        if dataclasses.is_dataclass(value) and _is_ours(type(value).__module__):
            fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
            return hash_of("dataclass", self.of(type(value)), self.of(fields))
        return self._of_instance(value)

    def _of_dict(self, value: dict[Any, Any]) -> str:
        return hash_of("dict", *(part for pair in value.items() for part in map(self.of, pair)))

    def _of_set(self, value: Collection[Any]) -> str:
        """Hash a set by its elements.

        Their order differs between processes, so no element's hash may depend on another element.
        """
        if all(type(each) in ATOMS for each in value):
            return hash_of("set", *sorted(map(self.of, value)))
        if id(value) in self._open_sets:
            return "seen set"
        open_sets = self._open_sets | {id(value)}
        return hash_of(
            "set", *sorted(_Fingerprint(self._modules, open_sets, self._in_sets).of_all(each) for each in value)
        )

    def _of_own_set(self, value: Collection[Any]) -> str:
        """Hash an object of a subclass of set or frozenset. Its `__reduce__` lists the elements in the set's order."""
        return hash_of("own set", self.of(type(value)), self._of_set(value), self.of(getattr(value, "__dict__", None)))

    def _of_sequence(self, value: Iterable[Any]) -> str:
        return hash_of(type(value).__name__, *map(self.of, value))

    def _of_method(self, value: types.MethodType) -> str:
        return hash_of("method", self.of(value.__func__), self.of(value.__self__))

    def _of_partial(self, value: functools.partial[Any]) -> str:
        parts = [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if type(value) is not functools.partial:
            parts.append(self.of(type(value)))
        return hash_of("partial", *parts)

    def _of_cached(self, value: Any) -> str:
        """Hash a function with a cache by the function that it wraps."""
        return hash_of("cached", self.of(value.__wrapped__))

    def _of_descriptor(self, value: Any) -> str:
        """Hash a property, class method or static method by its functions, and by its class if that is not a built-in
        class.
        """
        if isinstance(value, property):
            wrapped: Any = (value.fget, value.fset, value.fdel)
        else:
            wrapped = value.func if isinstance(value, functools.cached_property) else value.__func__
        own = type(value)
        return (
            self.of(wrapped) if _is_installed_module(own.__module__) else hash_of("own", self.of(own), self.of(wrapped))
        )

    def _of_named(self, value: Any) -> str:
        """Hash the name of a function that is written in C, and the object to which it is bound."""
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType) or _is_installed(owner):
            return self._of_name("named", value)
        return hash_of("bound", type(value).__name__, value.__qualname__, self.of(owner))

    def _of_name(self, what: str, value: Any) -> str:
        """Hash an importable value by its name, and by its module if the module may change."""
        name = getattr(value, "__module__", None)
        changes = self._modules.hash([name]) if isinstance(name, str) else ""
        return hash_of(what, f"{name}.{value.__qualname__}", *filter(None, [changes]))

    def _of_function(self, function: types.FunctionType) -> str:
        code, digest, module = function.__code__, hash_code(function.__code__), function.__module__ or ""
        if _is_installed(function) and not _is_ours(module):
            return self._of_name("function", function)
        if _is_singledispatch(function):  # it also has a cache, whose content depends on the process
            return hash_of("singledispatch", self._of_set(function.registry.items()))  # type: ignore[attr-defined]
        own = _is_ours(module) or not is_installed(code.co_filename)
        names = names_in(code)
        used = {name: function.__globals__[name] for name in names if own and name in function.__globals__}
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        parts = [
            digest,
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            self._or_module(module, lambda: self.of(cells)),
        ]
        for name, value in sorted(used.items()):
            of = functools.partial(self._of_used, value, names)
            parts += [name, self._or_module(module, of, lambda name=name: name in globals_in(code))]  # type: ignore[misc]
        if vars(function):
            parts.append(self._or_module(module, lambda: self._of_dict(vars(function))))
        if own and not _is_ours(module):
            parts += self._imported(function, digest, list(used.values()))
        return hash_of("function", *parts)

    def _imported(self, function: types.FunctionType, digest: str, used: list[Any]) -> list[str]:
        """Return the hash of a function's imports, and of its file if the file has changed since it was imported."""
        code, module = function.__code__, str(function.__globals__.get("__name__", ""))
        imports = imports_in(code)
        if any(value is searching for value in used for searching in _SEARCHING):
            imports = imports._replace(computed=True)
        names = self._modules.imported_by(imports, module, f"{module}.{function.__qualname__}")
        changed = self._modules.changed_code(module, code.co_qualname, digest)
        return list(filter(None, [self._modules.hash(names), changed]))

    def _of_used(self, value: Any, names: list[str]) -> str:
        """Hash a global value that a function uses. names: the names that the function uses, such as attributes of a
        module.
        """
        return self._of_module(value, names) if isinstance(value, types.ModuleType) else self.of(value)

    def _or_module(self, module: str, of: Callable[[], str], is_used: Callable[[], bool] = lambda: True) -> str:
        """Return the hash of a value, or the module's hash if the value holds an object without visible state, such as
        a lock.

        Workers import the module, so its code determines its values. Values of the main module are pickled if they are
        used.
        """
        try:
            return of()
        except NotPicklable:
            if (module == "__main__" or not self._modules.is_local(module)) and is_used():
                raise
            return hash_of("opaque", self._modules.hash([module]))

    def _of_module(self, module: types.ModuleType, names: Iterable[str] = ()) -> str:
        """Hash an installed module by its name and version, and any other module by its code and the code of its
        imports.

        names: the names that a function uses. Modules that the module holds under these names are included, because
        another module may have imported them. Values under these names that do not come from the module's file are
        included, too.
        """
        name = module.__name__
        if sys.modules.get(name) is not module or _has_no_file(module):  # the script has created it
            return hash_of(
                "module", name, self.of({key: each for key, each in vars(module).items() if key[:2] != "__"})
            )
        if not self._modules.is_local(name):
            return hash_of("module", name, *filter(None, [self._modules.hash([name])]))
        reached, waiting = {name: module}, [module]
        replaced: list[str] = []
        while waiting:
            each = waiting.pop()
            for key in sorted({key for key in names if key[:2] != "__"} & vars(each).keys()):
                value = vars(each)[key]
                if isinstance(value, types.ModuleType):
                    if value.__name__ not in reached and self._modules.is_local(value.__name__):
                        reached[value.__name__] = value
                        waiting.append(value)
                elif self._is_replaced(value):
                    replaced += [each.__name__, key, self._or_module(name, functools.partial(self.of, value))]
        return hash_of("module", name, self._modules.hash(reached), *replaced)

    def _is_replaced(self, value: Any) -> bool:
        """Return True if a value of a module certainly does not come from the module's file alone.

        Other values, for example those of caches, may depend on earlier work of the process.
        """
        if type(value) in ATOMS:
            return True
        if not isinstance(value, types.FunctionType):
            return False
        code, module = value.__code__, value.__module__ or ""
        return not (self._modules.is_local(module) and is_importable(value)) or bool(
            self._modules.changed_code(module, code.co_qualname, hash_code(code))
        )

    def _of_class(self, kind: type) -> str:
        if _is_installed(kind) or _is_ours(kind.__module__):
            return self._of_name("class", kind)
        members = {
            name: member
            for name, member in sorted(vars(kind).items())
            if name not in _DERIVED and (name == _KEPT_BY_PYDANTIC or not name.startswith("__pydantic_"))
        }
        # Python generated this docstring from defaults whose text differs between processes.
        if " at 0x" in str(members.get("__doc__")):
            del members["__doc__"]
        parts = [f"{kind.__module__}.{kind.__qualname__}", *map(self.of, kind.__bases__)]
        for name, member in members.items():
            parts += [name, self._or_module(kind.__module__, functools.partial(self.of, member))]
        if type(kind) is not type:
            parts.append(self.of(type(kind)))
        return hash_of("class", *parts)

    def _of_instance(self, value: Any) -> str:
        """Hash an object by its class and the contents of its pickle."""
        made = reduced(value)
        if isinstance(made, str):  # pickle stores the object by this global name
            name = str(getattr(value, "__module__", None) or "")
            return hash_of("global", self.of(type(value)), name, made, self._modules.hash([name]))
        function, arguments, *rest = made
        state, items, pairs, setter = [*rest, None, None, None, None][:4]
        contents = (state, None if items is None else list(items), None if pairs is None else list(pairs), setter)
        return hash_of("object", *map(self.of, (type(value), function, arguments, *contents)))


_PLAIN: dict[type, Callable[[_Fingerprint, Any], str]] = {
    dict: _Fingerprint._of_dict,
    list: _Fingerprint._of_sequence,
    tuple: _Fingerprint._of_sequence,
    set: _Fingerprint._of_set,
    frozenset: _Fingerprint._of_set,
}

_KINDS: tuple[tuple[Any, Callable[[_Fingerprint, Any], str]], ...] = (
    (types.FunctionType, _Fingerprint._of_function),
    (types.MappingProxyType, _Fingerprint._of_dict),
    (types.CodeType, lambda _, code: hash_code(code)),
    (types.MethodType, _Fingerprint._of_method),
    (functools.partial, _Fingerprint._of_partial),
    (_CACHED, _Fingerprint._of_cached),
    (_TYPE_VARIABLES, lambda _, value: hash_of("type variable", value.__name__)),
    (weakref.WeakSet, _Fingerprint._of_set),
    ((property, classmethod, staticmethod, functools.cached_property), _Fingerprint._of_descriptor),
    (types.ModuleType, _Fingerprint._of_module),
    (type, _Fingerprint._of_class),
    ((set, frozenset), _Fingerprint._of_own_set),
    (_IN_C, _Fingerprint._of_named),
)


def _is_installed(value: Any) -> bool:
    """Return True if a function or class belongs, under its name, to Python or an installed package."""
    # Cython's types have a metaclass whose `__module__` is a descriptor instead of a name.
    if isinstance(value, type) and (value.__module__ == "builtins" or not isinstance(value.__module__, str)):
        return True
    if not isinstance(value, (type, types.FunctionType)) or not is_importable(value):
        return False
    return _is_installed_module(value.__module__)


def _is_installed_module(name: str) -> bool:
    """Return True if an imported module belongs to Python or an installed package."""
    module = sys.modules.get(name)
    if module is None or name == "__main__":
        return False
    file = getattr(module, "__file__", None)
    return name.partition(".")[0] in sys.stdlib_module_names if file is None else is_installed(file)


def _is_ours(module: str) -> bool:
    """Return True if a module belongs to Manyhands, whose version is a part of every identity."""
    return module == "manyhands" or module.startswith("manyhands.")


def _is_singledispatch(function: types.FunctionType) -> bool:
    code = function.__code__
    return code.co_filename == functools.__file__ and code.co_qualname.startswith("singledispatch.")


def _has_no_file(module: types.ModuleType) -> bool:
    return module.__name__ != "__main__" and module.__spec__ is None and getattr(module, "__file__", None) is None


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # the variable has no value yet
        return False
    return True
