"""Hashes modules that are not installed, by their code and the code of the modules that they import.

The code of an installed package changes only with its version. Any other module may change between two runs. It is
identified by its code and by the code of all modules that it imports, because it is unknown which of them it uses. No
module is imported to determine this.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from manyhands.errors import ConfigError
from manyhands.prepare.plan.code import Import, Imports, hash_code, hash_of, imports_in, nested_code

_PACKAGES = ("site-packages", "dist-packages")

_SKIPPED = {*_PACKAGES, "__pycache__", "node_modules"}

_MOST_FILES = 2000
"""The maximum number of Python files in the folder of a function with computed imports. Home folders have more."""

_INTERNAL = "manyhands"


class _Source(NamedTuple):
    """The code of a file. codes: the hashes of its functions, by qualified name."""

    digest: str
    imports: Imports
    codes: Mapping[str, frozenset[str]]


class _Module(NamedTuple):
    """A module that no installed package provides. file: None for a package without `__init__.py`. folders: the folders
    of a package.
    """

    name: str
    file: str | None
    folders: tuple[str, ...] | None
    loader: Any

    @property
    def package(self) -> str:
        """Return the package to which the module's relative imports refer."""
        return self.name if self.folders is not None else self.name.rpartition(".")[0]


class LocalModules:
    """Hashes modules that are not installed. Files are read again by each new object."""

    def __init__(self) -> None:
        self._found: dict[str, _Module | None] = {}
        self._sources: dict[str, _Source] = {}
        self._hashes: dict[tuple[str, ...], str] = {}

    def is_local(self, name: str) -> bool:
        """Return True if the module is neither installed, nor a part of Python or Manyhands."""
        return self._find(name) is not None

    def hash(self, names: Iterable[str]) -> str:
        """Hash these modules and all modules that they import. For installed packages, hash their versions.

        Return an empty text if there are no such modules. Python's version is not included.
        """
        key = tuple(sorted(set(names)))
        if key not in self._hashes:
            reached = self._reached(key)
            self._hashes[key] = hash_of("modules", *reached) if reached else ""
        return self._hashes[key]

    def imported_by(self, imports: Imports, name: str, what: str) -> list[str]:
        """Return the names of the modules that code in the module `name` imports.

        If the code computes names, also return the modules in the same folder. Raises ConfigError if the code computes
        names and has no file, so that there is no such folder.
        """
        module = self._find(name)
        if imports.computed and (module is None or module.file is None):
            raise ConfigError(
                "a function of the job uses code that its own code does not name",
                where=what,
                hint="the function computes the name of code that it imports or evaluates, so changes of that code "
                "can't be "
                "detected: name the modules and functions, or move the function into a file",
            )
        return list(self._imported_by(imports, module or _Module(name, None, None, None)))

    def changed_code(self, name: str, qualname: str, digest: str) -> str | None:
        """Return the hash of the code that a module's file now has under a name, or None if it is unchanged or missing.

        The file may have changed since this process imported it, and workers import it again.
        """
        module = self._find(name)
        if module is None or name == "__main__" or module.file is None:
            return None
        codes = self._source(module).codes.get(qualname)
        return None if codes is None or digest in codes else hash_of("file", *sorted(codes))

    def _reached(self, names: Iterable[str]) -> list[str]:
        """Return the name and hash of each module that is reached through imports, in the order of names."""
        waiting, seen = deque(names), set[str]()
        reached: dict[str, str] = {}
        while waiting:
            name = waiting.popleft()
            if name in seen:
                continue
            seen.add(name)
            module = self._find(name)
            if module is None:
                version = version_of(name)
                reached |= {f"{name.partition('.')[0]} installed": version} if version else {}
                continue
            source = self._source(module)
            reached[module.name] = source.digest
            waiting += [*_parents(module.name), *self._imported_by(source.imports, module)]
        return [part for name in sorted(reached) for part in (name, reached[name])]

    def _imported_by(self, imports: Imports, module: _Module) -> Iterator[str]:
        yield from self._names(imports, module)
        if imports.computed:
            for each in self._beside(module):
                key = f"beside {each.name}"  # another module may have the same name
                self._found[key] = each
                yield key

    def _names(self, imports: Imports, module: _Module) -> Iterator[str]:
        for level, name, names in imports.found:
            absolute = _absolute(Import(level, name, names), module.package)
            yield from (absolute, *_parents(absolute))
            found = self._find(absolute)
            if found is None or found.folders is None:
                continue  # a name that is imported from a module may not be a module
            if "*" in names:
                yield from (each.name for each in self._below(found))
            yield from (f"{absolute}.{each}" for each in names if each != "*")

    def _find(self, name: str) -> _Module | None:
        """Return the module, or None if it doesn't exist, is installed, or belongs to Python or Manyhands."""
        if name not in self._found:
            self._found[name] = None  # this ends the recursion for a package that is its own parent
            self._found[name] = self._find_anew(name)
        return self._found[name]

    def _find_anew(self, name: str) -> _Module | None:
        top = name.partition(".")[0]
        if not name or top == _INTERNAL:
            return None
        loaded = sys.modules.get(name)
        if name == "__main__":
            file = getattr(loaded, "__file__", None)
            own = getattr(loaded, "__spec__", None)
            # With `python -m package.module`, relative imports refer to the package.
            return None if file is None else _Module(own.name if own else name, os.path.abspath(file), None, None)
        spec = getattr(loaded, "__spec__", None) or self._spec(name)
        if spec is None:
            return None
        folders = None if spec.submodule_search_locations is None else tuple(spec.submodule_search_locations)
        places = [spec.origin] if spec.has_location else list(folders or ())
        if not places or all(place is None or is_installed(place) for place in places):
            return None
        return _Module(name, spec.origin if spec.has_location else None, folders, spec.loader)

    def _spec(self, name: str) -> importlib.machinery.ModuleSpec | None:
        """Find a module without importing its packages."""
        parent, _, _ = name.rpartition(".")
        try:
            if not parent:
                return importlib.util.find_spec(name)
            package = self._find(parent)
            if package is None or package.folders is None:
                return None
            for finder in sys.meta_path:
                spec = finder.find_spec(name, package.folders) if hasattr(finder, "find_spec") else None
                if spec is not None:
                    return spec
        except (ImportError, ValueError, AttributeError):
            pass
        return None

    def _source(self, module: _Module) -> _Source:
        if module.file is None:
            return _Source("", Imports((), False), {})
        if module.file not in self._sources:
            self._sources[module.file] = _read(module.file, module.loader)
        return self._sources[module.file]

    def _beside(self, module: _Module) -> list[_Module]:
        """Return all modules in the folder of the module's top package, or in the folder of a script."""
        if module.file is None:
            return []
        folder = Path(module.file).parent
        while (folder / "__init__.py").exists():
            folder = folder.parent
        top = module.name.partition(".")[0]
        if "." in module.name or module.folders is not None:
            return list(self._in_folder(folder / top, f"{top}."))
        return list(self._in_folder(folder, ""))

    def _below(self, package: _Module) -> Iterator[_Module]:
        for folder in package.folders or ():
            yield from self._in_folder(Path(folder), f"{package.name}.", deep=False)

    @staticmethod
    def _in_folder(folder: Path, prefix: str, *, deep: bool = True) -> Iterator[_Module]:
        count = 0
        for place, folders, files in os.walk(folder):
            folders[:] = sorted(each for each in folders if deep and each not in _SKIPPED and each[:1] != ".")
            found = sorted(each for each in files if each.endswith(".py"))
            if "pyvenv.cfg" in files or not found:  # the folder is another installation, or holds data
                folders.clear()
                continue
            within = ".".join(Path(place).relative_to(folder).parts)
            for file in found:
                count += 1
                if count > _MOST_FILES:
                    raise ConfigError(
                        "a function of the job uses code that its own code does not name",
                        where=str(folder),
                        got=f"more than {_MOST_FILES} Python files that it may mean",
                        hint="name the modules and functions, or put the modules into a folder of their own",
                    )
                name = prefix + ".".join(part for part in (within, file.removesuffix(".py")) if part)
                package = name.removesuffix(".__init__") if file == "__init__.py" else None
                path = os.path.join(place, file)
                yield _Module(package or name, path, None if package is None else (place,), None)


def is_installed(file: str) -> bool:
    """Return True if the file belongs to Python or an installed package, whose code changes only with its version."""
    if any(f"{os.sep}{name}{os.sep}" in file for name in _PACKAGES):
        return True
    return file in ("built-in", "frozen") or file.startswith("<frozen ") or _is_in_python(os.path.dirname(file))


@lru_cache(maxsize=1024)
def _is_in_python(folder: str) -> bool:
    real = os.path.realpath(folder)
    return any(real == place or real.startswith(place + os.sep) for place in _python_folders())


@lru_cache(maxsize=1)
def _python_folders() -> tuple[str, ...]:
    """Return the folders of the standard library, as they are and with links resolved."""
    paths = sysconfig.get_paths()
    places = {os.path.realpath(paths[key]) for key in ("stdlib", "platstdlib")}
    places |= {os.path.realpath(os.path.dirname(os.__file__))}
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    zipped = {os.path.join(os.path.dirname(place), f"python{version}.zip") for place in places}
    return tuple(sorted(places | zipped))


def is_importable(value: Any) -> bool:
    """Return True if a function or class is found in its module under its name, so that a worker can import it."""
    module, (first, *rest) = getattr(value, "__module__", None), value.__qualname__.split(".")
    found: Any = getattr(sys.modules.get(module or ""), "__dict__", {}).get(first)
    for name in rest:
        found = getattr(found, name, None)
    return found is value


def version_of(name: str) -> str:
    """Return the version of the installed package to which a module belongs, or "" for modules of Python."""
    top = name.partition(".")[0]
    return "" if top == _INTERNAL or top in sys.stdlib_module_names else _installed_version(top)


@lru_cache(maxsize=1024)
def _installed_version(distribution: str) -> str:
    from importlib import metadata  # imported here, because it takes a long time

    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        return ""  # the package and its module have different names


def _read(file: str, loader: Any) -> _Source:
    """Read a module's file, which may be in a zip archive. A file that is not Python source is hashed as bytes."""
    try:
        data = Path(file).read_bytes()
    except OSError:
        try:
            data = loader.get_data(file)
        except Exception:  # a loader of another package may raise anything
            return _Source("gone", Imports((), False), {})
    return _parse(data, file.endswith((".py", ".pyw")) or not Path(file).suffix)


@lru_cache(maxsize=256)
def _parse(data: bytes, is_source: bool) -> _Source:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python has already shown these warnings when it compiled the module
            code = compile(data, "<source>", "exec", dont_inherit=True) if is_source else None
    except (SyntaxError, ValueError, RecursionError):
        code = None
    if code is None:
        return _Source(hashlib.sha256(data).hexdigest(), Imports((), False), {})
    codes: dict[str, set[str]] = {}
    for part in nested_code(code):
        codes.setdefault(part.co_qualname, set()).add(hash_code(part))
    return _Source(hash_code(code), imports_in(code), {name: frozenset(each) for name, each in codes.items()})


def _absolute(imported: Import, package: str) -> str:
    if not imported.level:
        return imported.name
    parts = package.split(".")
    base = ".".join(parts[: len(parts) - imported.level + 1])
    return f"{base}.{imported.name}" if imported.name else base


def _parents(name: str) -> Iterator[str]:
    """Yield the packages that contain a module, because importing the module imports them."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
