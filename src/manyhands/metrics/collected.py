"""Metrics that need the predictions of all samples at once, such as an exact AUROC, BLEU, or those of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.formatting import format_bytes
from manyhands.metrics.metric import Figure, Measured, name_of_function

_WHOLE = "the value"  # the only column of values that are neither a tuple nor a mapping


class Collected:
    """A metric of values that are collected from all samples, in the order of the data.

    name: the name of the figure. then: computes the figure, on the first worker only.
    """

    def __init__(
        self, name: str, pick: Callable[[Any, Any], Any], then: Callable[[Any], Any], max_bytes: int = 1 << 30
    ) -> None:
        self.name, self._pick, self._then, self._max_bytes = name, pick, then, max_bytes

    def named(self, name: str) -> Collected:
        """Return the metric under another name."""
        return Collected(name, self._pick, self._then, self._max_bytes)

    def rows(self, measured: Measured) -> pa.RecordBatch:
        """Return this micro-batch's values. Raises ConfigError for values that can't be collected."""
        picked = self._pick(measured.output, measured.batch)
        columns = _columns(picked)
        arrays = [self._array(name, column) for name, column in columns.items()]
        lengths = {name: len(array) for name, array in zip(columns, arrays, strict=True)}
        if len(set(lengths.values())) != 1:
            raise ConfigError(
                f"the metric {self.name} picked values of different lengths",
                expected="one row for each sample, or the same number of rows in all parts",
                got=", ".join(f"{name}: {length}" for name, length in lengths.items()),
            )
        kind = "mapping" if isinstance(picked, Mapping) else "tuple" if isinstance(picked, tuple) else "single"
        fields = [
            pa.field(name, array.type, metadata={"array": "" if isinstance(column, list) else str(column.dtype)})
            for (name, column), array in zip(columns.items(), arrays, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields, metadata={"kind": kind}))

    def check_size(self, num_bytes: int, samples: int | None = None) -> None:
        """Raise ConfigError if the values take too much memory.

        num_bytes: the projected size of the values of all `samples`, or the size of those collected so far.
        """
        if num_bytes > self._max_bytes:
            got = "before the end"
            if samples is not None:
                got = f"{format_bytes(num_bytes // samples)} for each of {samples:,} samples"
            raise ConfigError(
                f"the metric {self.name} would collect too much",
                expected=f"at most {format_bytes(self._max_bytes)}",
                got=f"{format_bytes(num_bytes)}: {got}",
                hint="pick less per sample, for example the class with the largest score instead of all scores; or "
                "raise max_bytes, or use fewer samples",
            )

    def figure(self, batches: Sequence[pa.RecordBatch]) -> Figure:
        """Compute the figure. batches: the values of all micro-batches, in order. Raises ConfigError."""
        try:
            table = pa.Table.from_batches(list(batches))
        except (pa.ArrowInvalid, ValueError) as error:
            raise ConfigError(
                f"the metric {self.name} picked values of different types or shapes in different micro-batches",
                got=str(error).partition("\n")[0][:200],
                hint="pad arrays to one shape, or return lists, with one list or text for each sample",
            ) from None
        columns = {field.name: _values(field, table.column(field.name)) for field in table.schema}
        kind = (table.schema.metadata or {}).get(b"kind")
        values: Any = columns
        if kind == b"single":
            values = columns[_WHOLE]
        elif kind == b"tuple":
            values = tuple(columns.values())
        return plain_figure(self.name, self._then(values))

    def _array(self, name: str, column: Any) -> pa.Array:
        if isinstance(column, np.ndarray):
            if column.ndim == 1:
                return pa.array(column)
            if column.ndim > 1 and column.dtype.kind in "iufb":
                return _tensors(column.astype(np.uint8) if column.dtype.kind == "b" else column)
        elif isinstance(column, list):
            try:
                return pa.array(column)
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
                pass
        raise ConfigError(
            f"the metric {self.name} picked values that can't be collected",
            expected="tensors, arrays, or lists of numbers and text, with one row for each sample; or a tuple or "
            "mapping of them",
            got=f"{type(column).__name__} ({name})",
        )


def collected(
    pick: Callable[[Any, Any], Any],
    then: Callable[[Any], Any],
    *,
    name: str | None = None,
    max_bytes: int = 1 << 30,
) -> Collected:
    """A metric that needs all predictions at once.

    pick: (output, batch) -> one row for each sample: a tensor or array [n, ...], a list of numbers or text, or a tuple
    or mapping of these. It is called for each micro-batch. Return little: the predicted class, not all scores.
    then: (values) -> a number, or a mapping of names to numbers. It is called once, on the first worker, with the rows
    of all samples in the order of the data; tensors have become NumPy arrays. name: the name of the figure, by default
    that of `then`. max_bytes: the memory that the rows may take. An evaluation that would take more is refused before
    the first step.
    """
    return Collected(name or name_of_function(then), pick, then, max_bytes)


def _columns(picked: Any) -> dict[str, Any]:
    if isinstance(picked, Mapping):
        parts = {str(key): value for key, value in picked.items()}
    elif isinstance(picked, tuple):
        parts = {str(index): value for index, value in enumerate(picked)}
    else:
        parts = {_WHOLE: picked}
    return {name: _as_array(value) for name, value in parts.items()}


def _as_array(value: Any) -> Any:
    if isinstance(value, Tensor):
        array = value.detach().cpu()
        # NumPy has no bf16, and Arrow computes little with fp16.
        value = (array.float() if array.is_floating_point() and array.element_size() < 4 else array).numpy()
    # Copy the value: if it is a view of a part of the output, Arrow would keep the memory of the whole output.
    return value.copy() if isinstance(value, np.ndarray) else value


def _tensors(array: np.ndarray) -> pa.Array:
    """Return an array [n, ...] as n tensors. Arrow's own function refuses arrays without rows."""
    if len(array):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array))
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.array([], type=kind.storage_type))


def _values(field: pa.Field, column: pa.ChunkedArray) -> Any:
    dtype = (field.metadata or {})[b"array"].decode()
    if not dtype:
        return column.to_pylist()
    if isinstance(field.type, pa.FixedShapeTensorType):
        chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks if len(chunk)]
        empty = np.empty((0, *field.type.shape), dtype=field.type.value_type.to_pandas_dtype())
        return np.concatenate([empty, *chunks]).astype(dtype, copy=False)
    return column.to_numpy()


def plain_figure(name: str, value: Any) -> Figure:
    """Return a figure as numbers of Python: a float, None, or a mapping or list of them. Raises ConfigError."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_figure(name, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_figure(name, each) for each in value]
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise ConfigError(
        f"the metric {name} computed something that isn't a number",
        expected="a number, None, or a mapping or list of numbers",
        got=type(value).__name__,
    )
