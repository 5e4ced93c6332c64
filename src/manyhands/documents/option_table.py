"""TOML tables derived from classes that declare options."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin

from pydantic import Field, create_model, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from manyhands.documents.toml import Table
from manyhands.options import check_option, declared, types_of

T = TypeVar("T")


class OptionTable(Table, Generic[T]):
    """`OptionTable[Recipe]` is a table of the options of Recipe that TOML can have.

    It checks each option as Recipe does.
    """

    options_of: ClassVar[type]
    prefix: ClassVar[str | None] = None  # the text before an option's name in errors; None for the class's name

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return the fields that are derived from the options."""

    def __class_getitem__(cls, owner: Any) -> Any:
        return cls if isinstance(owner, TypeVar) else _derived(cls, owner)

    @field_validator("*")
    @classmethod
    def _as_the_option_declares(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name in option_names(cls.options_of):
            check_option(cls.options_of, str(info.field_name), value, cls.prefix)
        return value

    def option_values(self) -> dict[str, Any]:
        """Return the values of the options, as keyword arguments of their class."""
        values = {name: getattr(self, name) for name in option_names(self.options_of)}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class BuildableTable(OptionTable[T], Generic[T]):
    """An `OptionTable` that must have all required values of its class. It checks that they form a valid object."""

    @model_validator(mode="after")
    def _as_the_class_checks(self) -> BuildableTable[T]:
        self.build()
        return self

    def build(self, **changes: Any) -> T:
        """Create the object. changes: values that replace those of the table. Raises ConfigError."""
        built: T = self.options_of(**self.option_values() | changes)
        return built


def option_names(owner: type) -> list[str]:
    """Return the names of the options that a TOML table can have."""
    return [name for name, option in declared(owner).items() if option.in_toml]


@functools.cache
def _derived(base: type[Table], owner: type) -> type[Table]:
    found = {field.name: field for field in fields(owner)}
    columns: dict[str, Any] = {}
    for name, annotation in types_of(owner, option_names(owner)).items():
        default: dict[str, Any] = {}
        if found[name].default is not MISSING:
            default["default"] = _toml_value(found[name].default)
        elif found[name].default_factory is not MISSING:
            default["default_factory"] = found[name].default_factory
        columns[name] = (_toml_type(annotation), Field(description=declared(owner)[name].help, **default))
    table = create_model(f"{owner.__name__}Table", __base__=base, __module__=__name__, **columns)
    table.options_of = owner  # type: ignore[attr-defined]
    return table


def _toml_type(annotation: Any) -> Any:
    """Return the type that a value has in TOML: sequences are arrays, mappings are tables, and paths are strings."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return Union[tuple(_toml_type(each) for each in arguments if get_origin(each) is not PathLike)]  # noqa: UP007
    if origin in (tuple, Sequence):
        return list[_toml_type(arguments[0])]  # type: ignore[misc]
    if origin is Mapping:
        return dict[_toml_type(arguments[0]), _toml_type(arguments[1])]  # type: ignore[misc]
    return annotation


def _toml_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
