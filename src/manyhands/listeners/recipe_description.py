"""Describes a recipe in JSON values, for the run directory and for listeners."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from manyhands.config import Recipe
from manyhands.options import declared
from manyhands.validation import Validation


def describe(recipe: Recipe) -> dict[str, Any]:
    """Describe a recipe in JSON values: functions by name and source line, the data by type and length."""
    described: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "data":
            stream = recipe.stream
            facts = {"samples": len(value)} if stream is None else stream.facts(recipe.batch.micro_batches)
            described[field.name] = {"type": _name(type(value)) if stream is None else _name(stream.data), **facts}
        elif field.name == "validation" and value is not None:
            described[field.name] = {name: _described_validation(each) for name, each in recipe.validations.items()}
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            described[field.name] = dataclasses.asdict(value)
        else:
            described[field.name] = _name(value) if callable(value) else value
    return described


def _described_validation(validation: Validation) -> dict[str, Any]:
    given = validation.metrics
    metrics = list(given) if isinstance(given, Mapping) else [x if isinstance(x, str) else _name(x) for x in given]
    described = {
        name: _name(value) if callable(value) else value
        for name in declared(Validation)
        if name not in ("data", "metrics") and (value := getattr(validation, name)) is not None
    }
    data = {"type": _name(type(validation.data)), "samples": len(validation.data)}
    return {"data": data, "metrics": metrics, **described}


def _name(value: Any) -> str:
    """Return `module:name`, with file and line if the object has Python code."""
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}:{named.__qualname__}"
    code = getattr(value, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name
