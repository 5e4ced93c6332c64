"""Gives all files of a Parquet output one schema.

Each task infers the schema of its file from its own records, so a column may have only nulls in one file, and whole
numbers or floats in other files. When all tasks are complete, their schemas are compared. Tasks write the files that
lack the common schema again, into a separate folder, so the job can be killed at any point. If all schemas are equal,
no file is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from manyhands.errors import DataError
from manyhands.prepare.plan.plan import Stage
from manyhands.prepare.records.schemas import (
    common_schema,
    common_type,
    schema_digest,
    schema_from_text,
    schema_to_text,
)
from manyhands.prepare.records.unfit import Unfit
from manyhands.prepare.task import Task, TaskResult
from manyhands.storage.files import join_path

_REWRITTEN = "-schema-"


def is_rewritten_folder(name: str, stages: AbstractSet[str]) -> bool:
    """Return True if `name` is the folder of rewritten files of a stage. stages: the names of the stages' folders."""
    return name.partition(_REWRITTEN)[0] in stages and _REWRITTEN in name


def renamed(stage: Stage) -> Stage:
    """Return the stage, with the title for the tasks that write files again."""
    return replace(stage, title=f"{stage.title} → write again with one schema")


def one_schema_tasks(results: Sequence[TaskResult], tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks that write files again so that all files have one schema. The list is empty for equal schemas.

    results: the results of all tasks of a stage. Raises DataError if two files have no common schema.
    """
    written = [result for result in results if result.schema is not None]
    if len({result.schema for result in written}) < 2:
        return []
    schemas = {result.schema: schema_from_text(str(result.schema)) for result in written}
    common: Any = None
    for result in written:
        try:
            mine = schemas[result.schema]
            common = mine if common is None else common_schema(common, mine)
        except Unfit as error:
            raise _incompatible(error, result, written, schemas) from error
    text = schema_to_text(common)
    name = schema_digest(common)[:12]
    return [
        replace(
            task,
            folder=f"{task.folder}{_REWRITTEN}{name}",
            rewrites=join_path(task.folder, str(result.file)),
            schema=text,
        )
        for task, result in zip(tasks, results, strict=True)
        if result.schema is not None and not schemas[result.schema].equals(common)
    ]


def _incompatible(
    error: Unfit, result: TaskResult, written: Sequence[TaskResult], schemas: dict[str | None, Any]
) -> DataError:
    """Return the error for a file with a column that has no common type with the same column of an earlier file."""
    kind = schemas[result.schema].field(error.column).type
    conflicting = (
        earlier
        for earlier in written
        if error.column in schemas[earlier.schema].names
        and common_type(schemas[earlier.schema].field(error.column).type, kind) is None
    )
    # The common type of the earlier files may be incompatible with this file's type, although each of their types is
    # compatible.
    other = next(conflicting, written[0])
    return DataError(
        f"the files of the output have no common schema: {error}",
        where=f"{other.file} and {result.file}",
        expected=f"one type of column {error.column!r}: {schemas[other.schema].field(error.column).type} (as in "
        f"{other.file})",
        got=f"{kind} (in {result.file})",
        hint="use values of one type in a column, or set the types with write(schema=...)",
    )
