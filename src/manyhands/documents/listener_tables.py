"""The listeners that a recipe file names."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from manyhands.documents.functions import IMPORT_PATH, Arguments, Binder, Target
from manyhands.documents.toml import Document, Table, raise_all
from manyhands.errors import ConfigError
from manyhands.options import nearest

_CLASSES = {
    "csv": "CSVListener",
    "tensorboard": "TensorBoardListener",
    "wandb": "WandbListener",
    "mlflow": "MLflowListener",
}

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}

_CSV_FOLDER = "csv"
"""Where CSV files are written in the run directory, unless an argument names another folder."""


class ListenerTable(Table):
    """A listener of `manyhands.listeners` by its short name, or a class or function by path, with arguments."""

    name: str | None = None
    path: str | None = Field(default=None, pattern=IMPORT_PATH)
    arguments: Arguments = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        """Take "csv" for { name = "csv" }, and "module:name" for { path = "module:name" }."""
        if not isinstance(value, str):
            return value
        return {"path": value} if re.match(IMPORT_PATH, value) else {"name": value}

    @field_validator("name")
    @classmethod
    def _known_name(cls, value: str | None) -> str | None:
        if value is not None and value not in _CLASSES:
            raise ConfigError(
                "there is no such listener",
                expected=f"{', '.join(_CLASSES)}, or module:name for your own",
                got=repr(value),
                hint=nearest(value, _CLASSES),
            )
        return value

    @model_validator(mode="after")
    def _has_name_or_path(self) -> ListenerTable:
        if (self.name is None) == (self.path is None):
            raise ConfigError(
                "a listener needs either a name or a path",
                expected='"csv", or { path = "module:name", arguments = {} }',
            )
        return self


def check_packages(listeners: list[ListenerTable], document: Document[Any]) -> None:
    """Raise ConfigError for all listeners whose package isn't installed."""
    raise_all(
        [
            ConfigError(
                f"the listener {table.name} needs a package that isn't installed",
                where=document.origin("listeners", index),
                expected=_PACKAGES[table.name],
                hint=f"pip install 'manyhands[{table.name}]'",
            )
            for index, table in enumerate(listeners)
            if table.name in _PACKAGES and importlib.util.find_spec(_PACKAGES[table.name]) is None
        ],
        document.path,
    )


def bind_listeners(listeners: list[ListenerTable], binder: Binder) -> list[Callable[[Path], Any]]:
    """Return functions that create the listeners, given the run directory. `binder` has the errors."""
    return [
        _bound(table, binder, index)
        for index, table in enumerate(listeners)
        # A run directory has the curves already, so only another directory needs another listener.
        if table.name != "tensorboard" or table.arguments
    ]


def _bound(table: ListenerTable, binder: Binder, index: int) -> Callable[[Path], Any]:
    in_run = table.name == "csv" and "folder" not in table.arguments
    path = table.path or f"manyhands.listeners:{_CLASSES[str(table.name)]}"
    create = binder.bind(
        Target(path=path, arguments=table.arguments), ("folder",) if in_run else (), "listeners", index
    )
    return (lambda run_dir: create(run_dir / _CSV_FOLDER)) if in_run else (lambda run_dir: create())
