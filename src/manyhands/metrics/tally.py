"""Adds the parts of all micro-batches, whichever workers computed them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from manyhands.comm.agreement import all_gather_bytes, all_gather_json
from manyhands.comm.group import Group
from manyhands.errors import ConfigError, ManyhandsError
from manyhands.metrics.collected import Collected
from manyhands.metrics.metric import Figure, Measured, Metric, Totals, ratio

ROUNDS_PER_EXCHANGE = 32
"""The number of micro-batches that a worker computes between two exchanges. It has no influence on the figures."""

_LOSS = ""  # the name under which the loss is added beside the metrics

Layout = list[tuple[str, str, str, list[int]]]
"""For each array of a micro-batch: the metric, the array's name, "sum" or "count", and the shape."""


class Tally:
    """The totals of an evaluation.

    Call `add` for each micro-batch that this worker has computed, in order; `exchange` when all workers have computed
    as many rounds; and `figures` after the last exchange. Counts are int64, whose order of addition doesn't matter.
    Sums are fp64, and added in the order of the micro-batches. Only the first worker stores collected values.
    samples: the number of samples in all micro-batches. is_trial: True for an evaluation of some micro-batches only,
    from which a metric that needs all predictions can't always be computed.
    not_computed: why such metrics could not be computed, by name.
    """

    def __init__(
        self,
        group: Group,
        metrics: Mapping[str, Metric | Collected],
        samples: int,
        where: str,
        *,
        is_trial: bool = False,
    ) -> None:
        self._group, self._where, self._samples, self._is_trial = group, where, samples, is_trial
        self.not_computed: dict[str, str] = {}
        self._metrics = {name: metric for name, metric in metrics.items() if isinstance(metric, Metric)}
        self._collected = {name: metric for name, metric in metrics.items() if isinstance(metric, Collected)}
        self._layout: Layout | None = None
        self._agreed = False
        self._sums: dict[int, np.ndarray] = {}  # of this worker, by micro-batch, since the last exchange
        self._total, self._counts = np.zeros(0), np.zeros(0, dtype=np.int64)
        self._rows: list[tuple[int, str, pa.RecordBatch]] = []
        self._bytes = dict.fromkeys(self._collected, 0)  # of the values that this worker stores
        self._all_rows: dict[str, list[pa.RecordBatch]] = {name: [] for name in self._collected}

    def add(self, micro_batch: int, measured: Measured, of_loss: Mapping[str, Totals]) -> None:
        """Add the results of a micro-batch. of_loss: the parts of the metrics that the loss function returned.

        Raises ConfigError, also for an exception in a metric.
        """
        parts: dict[str, Totals] = {
            _LOSS: {
                "loss": np.float64(measured.loss),  # type: ignore[dict-item]
                "weight": np.float64(measured.weight),  # type: ignore[dict-item]
                "samples": np.int64(measured.samples),  # type: ignore[dict-item]
            }
        }
        parts |= of_loss
        where = f"{self._where}, micro-batch {micro_batch}"
        for name, metric in self._metrics.items():
            with _explained(name, where):
                parts[name] = {key: _int64_or_fp64(name, value) for key, value in metric.measure(measured).items()}
        for name, collected in self._collected.items():
            with _explained(name, where):
                rows = collected.rows(measured)
                if micro_batch == 0:  # projected from the first micro-batch only, whichever worker has it
                    collected.check_size(rows.nbytes * self._samples // measured.samples, self._samples)
                self._rows.append((micro_batch, name, rows))
                # Later micro-batches may be larger than the first one, and there may be many before an exchange.
                self._bytes[name] += rows.nbytes
                collected.check_size(self._bytes[name])
        layout: Layout = []
        sums: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for name in sorted(parts):
            for key, value in sorted(parts[name].items()):
                array = np.asarray(value)
                is_count = array.dtype.kind == "i"
                layout.append((name, key, "count" if is_count else "sum", list(array.shape)))
                (counts if is_count else sums).append(array.ravel())
        self._check_layout(layout, where)
        self._sums[micro_batch] = np.concatenate(sums)
        self._counts = self._counts + np.concatenate(counts)

    def exchange(self, tag: str) -> None:
        """Add the sums of all workers since the last exchange. Collective."""
        if not self._agreed:
            self._agree(tag)
        width = len(self._total)
        mine = np.array([[micro_batch, *sums] for micro_batch, sums in self._sums.items()]).reshape(-1, 1 + width)
        received = all_gather_bytes(self._group, mine.tobytes(), f"{tag} / sums / control")
        rows = np.concatenate([np.frombuffer(each, dtype=np.float64).reshape(-1, 1 + width) for each in received])
        for row in rows[np.argsort(rows[:, 0], kind="stable")]:
            self._total = self._total + row[1:]
        self._sums = {}
        if self._collected:
            received = all_gather_bytes(self._group, _packed(self._rows), f"{tag} / values / control")
            if self._group.rank == 0:
                found = sorted((row for each in received for row in _unpacked(each)), key=lambda row: row[0])
                for _, name, batch in found:
                    self._all_rows[name].append(batch)
            self._rows = []
            for name, collected in self._collected.items():
                self._bytes[name] = sum(batch.nbytes for batch in self._all_rows[name])
                with _explained(name, self._where):
                    collected.check_size(self._bytes[name])

    def figures(self, tag: str) -> tuple[float | None, float, dict[str, Figure]]:
        """Return the mean loss, its weight, and the figures of the metrics. Collective. Raises ConfigError."""
        counts = np.zeros_like(self._counts)
        for each in all_gather_bytes(self._group, self._counts.tobytes(), f"{tag} / counts / control"):
            counts = counts + np.frombuffer(each, dtype=np.int64)
        totals = self._named(self._total, counts)
        loss = totals.pop(_LOSS)
        found: dict[str, Figure] = {}
        for name, parts in totals.items():
            with _explained(name, self._where):
                metric = self._metrics.get(name)
                found[name] = ratio(parts["sum"], parts["weight"]) if metric is None else metric.figure(parts)
        of_all: dict[str, Figure] = {}
        if self._collected and self._group.rank == 0:
            for name, collected in self._collected.items():
                with _explained(name, self._where):
                    of_all[name] = self._figure_of(name, collected)
        if self._collected:
            mine = of_all, self.not_computed
            all_ranks: list[Any] = all_gather_json(self._group, mine, f"{tag} / figures / control")
            found |= all_ranks[0][0]
            self.not_computed = all_ranks[0][1]
        return ratio(loss["loss"], loss["weight"]), float(loss["weight"]), found

    def _figure_of(self, name: str, collected: Collected) -> Figure:
        try:
            return collected.figure(self._all_rows[name])
        except Exception as error:
            # An AUROC, for example, needs samples of two classes, which a trial may lack.
            if not self._is_trial or isinstance(error, ManyhandsError):
                raise
            self.not_computed[name] = f"{type(error).__name__}: {error}"
            return None

    def _check_layout(self, layout: Layout, where: str) -> None:
        if self._layout is None:
            self._layout = layout
            self._begin_counts()
        if layout == self._layout:
            return
        for known, now in zip(self._layout, layout, strict=False):
            if known != now:
                raise ConfigError(
                    f"the metric {now[0] or known[0]} returned a different form than before",
                    where=where,
                    expected=_described(known),
                    got=_described(now),
                    hint="return arrays of the same shapes and kinds for all micro-batches: a sum that is an integer "
                    "in one micro-batch must be an integer in all",
                )
        if len(self._layout) != len(layout):
            raise ConfigError(
                "metrics returned different arrays than before",
                where=where,
                expected=", ".join(map(_described, self._layout)),
                got=", ".join(map(_described, layout)),
            )

    def _agree(self, tag: str) -> None:
        """Agree on the layout, which workers without a micro-batch don't know. Collective."""
        layouts: list[Any] = all_gather_json(self._group, self._layout, f"{tag} / layout / control")
        first: Layout = next([(a, b, c, d) for a, b, c, d in each] for each in layouts if each is not None)
        mine = self._layout
        self._layout, self._agreed = first, True
        if mine is None:
            self._begin_counts()
        else:
            self._check_layout(mine, self._where)
        self._total = np.zeros(sum(_numel(each) for each in first if each[2] == "sum"))

    def _begin_counts(self) -> None:
        numel = sum(_numel(each) for each in self._layout or [] if each[2] == "count")
        self._counts = np.zeros(numel, dtype=np.int64)

    def _named(self, sums: np.ndarray, counts: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """Divide the flat totals into the arrays of each metric."""
        found: dict[str, dict[str, np.ndarray]] = {}
        starts = {"sum": 0, "count": 0}
        for each in self._layout or []:
            name, key, kind, shape = each
            start, starts[kind] = starts[kind], starts[kind] + _numel(each)
            flat = (sums if kind == "sum" else counts)[start : starts[kind]]
            found.setdefault(name, {})[key] = flat.reshape(shape)
        return found


def _numel(each: tuple[str, str, str, list[int]]) -> int:
    return int(np.prod(each[3], dtype=np.int64))


def _described(each: tuple[str, str, str, list[int]]) -> str:
    kind = "an integer" if each[2] == "count" else "a floating-point number"
    return f"{each[0]}.{each[1]}: {kind}" + (f" of shape {each[3]}" if each[3] else "")


def _int64_or_fp64(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    raise ConfigError(f"the metric {name} returned an array that isn't of numbers", got=f"dtype {array.dtype}")


class _explained:
    """Context in which an exception of a metric becomes a ConfigError that names the metric."""

    def __init__(self, name: str, where: str) -> None:
        self._name, self._where = name, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ManyhandsError):
            error.where = error.where or self._where
        elif isinstance(error, Exception):
            raise ConfigError(
                f"the metric {self._name} raised {type(error).__name__}: {error}",
                where=self._where,
                hint="the traceback is above or below this message",
            ) from error


def _packed(rows: list[tuple[int, str, pa.RecordBatch]]) -> bytes:
    """Return the rows as bytes: a line of JSON with their lengths, then Arrow's streams."""
    blobs, header = [], []
    for micro_batch, name, batch in rows:
        stream = io.BytesIO()
        with pa.ipc.new_stream(stream, batch.schema) as writer:
            writer.write_batch(batch)
        blobs.append(stream.getvalue())
        header.append([micro_batch, name, len(blobs[-1])])
    return b"\n".join([json.dumps(header).encode(), b"".join(blobs)])


def _unpacked(data: bytes) -> Iterator[tuple[int, str, pa.RecordBatch]]:
    line, _, blobs = data.partition(b"\n")
    start = 0
    for micro_batch, name, length in json.loads(line):
        with pa.ipc.open_stream(blobs[start : start + length]) as reader:
            yield micro_batch, name, reader.read_next_batch()
        start += length
