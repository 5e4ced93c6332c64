"""Unfit: the error for values that can't have the type of their column."""

from __future__ import annotations


class Unfit(ValueError):
    """The error for values that can't have the type of their column. index: the first record with such a value."""

    def __init__(self, column: str, why: object, index: int | None = None) -> None:
        super().__init__(f"column {column!r}: {why}")
        self.column, self.index = column, index
