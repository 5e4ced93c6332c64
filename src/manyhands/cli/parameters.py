"""Parameters of commands, derived from dataclasses and from declared options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from manyhands.options import declared

A = TypeVar("A")


def with_parameters(
    arguments: type[A], options: type, *, after: str, as_overrides: bool = False
) -> Callable[[Callable[[A, dict[str, Any]], None]], Callable[..., None]]:
    """Return a decorator that makes `function(arguments, options)` a command for typer.

    arguments: a dataclass with the command's own parameters, annotated for typer. The function gets an instance of it.
    options: a class that declares options. Options with flags become parameters after the parameter `after`. The
        function gets a dict of their values by name.
    as_overrides: True if the options have no defaults, because their defaults come from a recipe. The function then
        gets only the values that were given.
    """
    own = _own_parameters(arguments)
    position = [parameter.name for parameter in own].index(after) + 1
    derived = _derived_parameters(options, has_defaults=not as_overrides)

    def decorate(function: Callable[[A, dict[str, Any]], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            given = {each.name: values.pop(each.name) for each in derived}
            if as_overrides:
                given = {name: value for name, value in given.items() if value is not None}
            function(arguments(**values), given)

        command.__doc__ = function.__doc__
        # typer reads this signature instead of the code.
        command.__signature__ = inspect.Signature([*own[:position], *derived, *own[position:]])  # type: ignore[attr-defined]
        return command

    return decorate


def with_arguments(arguments: type[A]) -> Callable[[Callable[[A], None]], Callable[..., None]]:
    """Return a decorator that makes `function(arguments)` a command for typer, without further options."""

    def decorate(function: Callable[[A], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(arguments(**values))

        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(_own_parameters(arguments))  # type: ignore[attr-defined]
        return command

    return decorate


def _own_parameters(arguments: type) -> list[inspect.Parameter]:
    types = get_type_hints(arguments, include_extras=True)
    return [_parameter(field.name, field.default, types[field.name]) for field in fields(arguments)]


def _derived_parameters(options: type, *, has_defaults: bool) -> list[inspect.Parameter]:
    defaults = {field.name: field.default if has_defaults else None for field in fields(options)}
    return [
        _parameter(
            name,
            defaults[name],
            Annotated[
                option.flag_type | None,
                typer.Option(
                    *option.flags,
                    metavar=option.metavar,
                    help=option.help,
                    show_default=defaults[name] is not None,
                ),
            ],
        )
        for name, option in declared(options).items()
        if option.flags
    ]


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def overrides_option(which: str) -> Any:
    """Return the declaration of the option --set, which changes values of a recipe. which: the end of its help."""
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Change a value of the recipe, {which}. Repeat as needed.",
        show_default=False,
    )
