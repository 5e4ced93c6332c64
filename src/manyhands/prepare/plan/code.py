"""Hashes compiled code, and finds what it imports, without running it.

The hash of code covers its instructions, constants and names. It does not depend on the code's position in the file, on
comments or on blank lines.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

ATOMS = (type(None), bool, int, float, complex, str, bytes)
"""The types of values without parts. A value of a subclass has parts, because its class may change."""

_SEARCHES_GLOBALS = {"eval", "exec", "globals", "__import__"}
"""Builtin functions whose argument, a text, may name any code. As attributes, these names have other meanings."""

_SEARCHES = {
    "__subclasses__",
    "exec_module",
    "iter_modules",
    "load_module",
    "run_module",
    "run_path",
    "spec_from_file_location",
    "walk_packages",
}
"""Functions and methods that use code that the caller's code does not name."""

_IMPORTS = {"__import__", "import_module"}

_IGNORED = {"CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL", "NOP", "RESUME", "KW_NAMES"}

_IMPORT_NAME = dis.opmap["IMPORT_NAME"]

_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


class Import(NamedTuple):
    """A module that code imports. level: the number of dots before the name. names: the names imported from the
    module.
    """

    level: int
    name: str
    names: tuple[str, ...] = ()


class Imports(NamedTuple):
    """The imports of code. computed: True if the code may also use other code by names that are computed at run
    time.
    """

    found: tuple[Import, ...]
    computed: bool


def hash_of(*parts: str) -> str:
    """Return a hash of these texts as 64 hex digits."""
    data = [part.encode("utf-8", "surrogatepass") for part in parts]
    # Each length is included, so that ("ab", "c") and ("a", "bc") differ.
    return hashlib.sha256(b"".join([b"%d:%b" % (len(each), each) for each in data])).hexdigest()


def hash_atom(value: Any) -> str:
    """Return the hash of a value without parts."""
    # By default, Python raises an error when it prints integers of more than 4,300 decimal digits.
    is_huge = type(value) is int and value.bit_length() > 10_000
    return hash_of(type(value).__name__, hex(value) if is_huge else repr(value))


def hash_code(code: types.CodeType) -> str:
    """Return the hash of code and of all code nested in it."""
    names = [*code.co_names, "|", *code.co_varnames, "|", *code.co_freevars]
    # Code with other exception handlers or other kinds of arguments may have the same instructions, so hash these, too.
    if code.co_exceptiontable:
        names += ["|", code.co_exceptiontable.hex()]
    if code.co_kwonlyargcount or code.co_posonlyargcount or code.co_flags & _VARIADIC:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _VARIADIC)
        names += ["|", *map(str, counts)]
    return hash_of("code", code.co_code.hex(), _hash_constant(code.co_consts), *names)


def _hash_constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return hash_code(value)
    if isinstance(value, tuple):
        return hash_of("tuple", *map(_hash_constant, value))
    if isinstance(value, frozenset):
        return hash_of("set", *sorted(map(_hash_constant, value)))
    return hash_atom(value)


def nested_code(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code and all code nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested_code(constant)


def names_in(code: types.CodeType) -> list[str]:
    """Return the names of globals, attributes and imports that the code and its nested code use, sorted."""
    return sorted({name for part in nested_code(code) for name in part.co_names})


def globals_in(code: types.CodeType) -> set[str]:
    """Return the names that the code and its nested code use as globals, and not only as attributes."""
    loaded = (each for part in nested_code(code) for each in dis.get_instructions(part))
    return {each.argval for each in loaded if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def imports_in(code: types.CodeType) -> Imports:
    """Return what the code and its nested code import."""
    found: list[Import] = []
    computed = False
    for part in nested_code(code):
        names = set(part.co_names)
        computed = computed or bool(names & _SEARCHES) or {"sys", "modules"} <= names
        if _IMPORT_NAME in part.co_code[::2] or names & (_IMPORTS | _SEARCHES_GLOBALS):
            computed = _scan(part, found) or computed
    return Imports(tuple(dict.fromkeys(found)), computed)


def _scan(code: types.CodeType, found: list[Import]) -> bool:
    """Append the imports of one code object. Return True if it imports or evaluates names that are not constants."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in _IGNORED]
    computed = False
    for index, instruction in enumerate(instructions):
        name = instruction.argval
        if instruction.opname == "IMPORT_NAME":
            level, names = instructions[index - 2].argval, instructions[index - 1].argval
            found.append(Import(int(level or 0), str(name), tuple(names or ())))
        elif name in _IMPORTS and instruction.opname.startswith("LOAD_"):
            module = _only_argument(instructions[index + 1 : index + 3])
            if module is None:
                computed = True
            else:
                found.append(Import(0, module))
        elif name in _SEARCHES_GLOBALS and instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            computed = True
    return computed


def _only_argument(instructions: Iterable[dis.Instruction]) -> str | None:
    """Return the text if these instructions call a function with a constant text as the only argument, and otherwise
    None.
    """
    load, call = [*instructions, None, None][:2]
    if load is None or call is None or load.opname != "LOAD_CONST" or not call.opname.startswith("CALL"):
        return None
    return load.argval if isinstance(load.argval, str) and call.arg == 1 and load.argval[:1] != "." else None
