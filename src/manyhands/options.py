"""Options, declared once: name, type, default, help text and check.

A class decorated with `options` is a frozen dataclass whose fields are declared with `option`. Everything else is
derived from the declarations: the checks when an object is created (`check_options`), the TOML table
(`documents.option_table`), the options of commands (`cli.parameters`), and the list of options in the docstring.

    @options
    class Oven:
        degrees: int = option(default=180, at_least=0, at_most=300, flags=("--degrees",), help="Temperature in C.")
"""

from __future__ import annotations

import difflib
import operator
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform, get_type_hints

from manyhands.errors import ConfigError

T = TypeVar("T")

_OPTION = "manyhands.option"  # the key of an Option in the metadata of its field


@dataclass(frozen=True, kw_only=True)
class Option:
    """The declaration of one option.

    help: what the option does, in full sentences. It is shown in docstrings and in the help of commands.
    choices: the values that are allowed; () allows any value.
    at_least: the least value of a number. An int here means that the option takes integers only.
    at_most: the greatest value of a number that has an `at_least`; None allows any finite value.
    in_toml: False if the value, such as a function, can't be written in a TOML file.
    flags: names on the command line, such as ("--workers", "-n"), or () if the option is not on the command line.
    flag_type: the type of the value on the command line.
    metavar: the placeholder for the value in the help of commands. It does not list the choices, because `help` does.
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    in_toml: bool = True
    flags: tuple[str, ...] = ()
    flag_type: type = str
    metavar: str = "NAME"

    def check(self, name: str, value: object) -> Any:
        """Return `value` in Python's own type. Raise ConfigError if it is not a choice or is out of range.

        Numbers may have the types of NumPy or torch. name: the option's name.
        """
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{name} has an unknown value",
                expected=f"one of {', '.join(self.choices)}",
                got=repr(value),
                hint=nearest(str(value), self.choices),
            )
        if self.at_least is not None:
            is_whole = isinstance(self.at_least, int)
            number = whole_number(value) if is_whole else real_number(value)
            if (
                number is None
                or not self.at_least <= number < float("inf")
                or (self.at_most is not None and number > self.at_most)
            ):
                noun = "an integer" if is_whole else "a number"
                limits = f"of at least {self.at_least}"
                if self.at_most is not None:
                    limits = f"from {self.at_least} to {self.at_most}"
                raise ConfigError(f"{name} is out of range", expected=f"{noun} {limits}", got=repr(value))
            return number
        return value


def whole_number(value: object) -> int | None:
    """Return an integer of Python, NumPy or torch as an int; None for anything else, such as True or 2.0."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None  # True is an int in Python, but is not meant as a number
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def real_number(value: object) -> float | int | None:
    """Return a number of Python, NumPy or torch as an int or a float; None for anything else, such as True or "2"."""
    if isinstance(value, float):
        return float(value)
    whole = whole_number(value)
    if whole is not None:
        return whole
    kind = str(getattr(value, "dtype", ""))
    if getattr(value, "ndim", None) != 0 or "float" not in kind:
        return None
    return float(value)  # type: ignore[arg-type]


def option(
    *,
    help: str,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    kw_only: bool = True,
    **more: Any,
) -> Any:
    """Declare a field of a class decorated with `options`.

    kw_only: False if the value may be passed by position. more: the other fields of `Option`.
    """
    metadata = {_OPTION: Option(help=help, **more)}
    return field(default=default, default_factory=default_factory, kw_only=kw_only, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, field))
def options(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass whose docstring lists the options."""
    created = dataclass(frozen=True, kw_only=True)(cls)
    described = [
        textwrap.fill(
            f"{name}: {each.help}", 110, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False
        )
        for name, each in declared(created).items()
    ]
    created.__doc__ = "\n".join([created.__doc__ or "", "", *described])
    return created


def declared(cls: type) -> dict[str, Option]:
    """Return the declarations of a class's options by name, in order."""
    return {each.name: each.metadata[_OPTION] for each in fields(cls) if _OPTION in each.metadata}


def types_of(cls: type, names: Iterable[str]) -> dict[str, Any]:
    """Return the types of some options of a class.

    Types of other options are not resolved: they may use modules that are imported only for type checkers (torch).
    """
    annotations = {each.name: each.type for each in fields(cls) if each.name in set(names)}
    return get_type_hints(type(cls.__name__, (), {"__annotations__": annotations, "__module__": cls.__module__}))


def check_option(cls: type, name: str, value: object, prefix: str | None = None) -> Any:
    """Check one value, and return it in Python's own type. Raises ConfigError. None is valid if it is the default.

    prefix: the text before the name in the error. The default is the name of the class: `strategy.` for Strategy.
    """
    default = next(each.default for each in fields(cls) if each.name == name)
    if value is not None or default is not None:
        prefix = f"{cls.__name__.lower()}." if prefix is None else prefix
        return declared(cls)[name].check(f"{prefix}{name}", value)
    return value


def check_options(values: object, prefix: str | None = None) -> None:
    """Check all options of an object that is being created, and give numbers Python's own types.

    Raises ConfigError for the first invalid option.
    """
    for name in declared(type(values)):
        checked = check_option(type(values), name, getattr(values, name), prefix)
        if checked is not getattr(values, name):
            object.__setattr__(values, name, checked)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known word closest to `name`, or lists all known words if none is close."""
    words = list(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(words))}"


def hint_nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the hint of `nearest`, or None if that hint would be empty, or too long because it lists all names of a
    module.
    """
    hint = nearest(name, known)
    return hint if len(hint) <= 300 and hint != "known: " else None
