"""Dataset: what users write; lazy until `write`, `take` or `count`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from manyhands.errors import ConfigError
from manyhands.prepare.io.listing import FORMATS, find_files, split_files
from manyhands.prepare.io.writing import check_format
from manyhands.prepare.job.output import PrepareSummary
from manyhands.prepare.options import JobOptions, options_of
from manyhands.prepare.plan.plan import (
    PARTITION_BYTES,
    Arranged,
    Cached,
    Counting,
    Given,
    Node,
    Output,
    Plan,
    Read,
    Step,
    make_plan,
)
from manyhands.prepare.records.aggregate import Aggregate, Grouping
from manyhands.prepare.records.chunks import size_bytes
from manyhands.prepare.records.keys import (
    ORDER_COLUMN,
    Key,
    KeyLike,
    as_function,
    columns_of,
    content_key,
    key_from,
    key_name,
)
from manyhands.prepare.records.operations import Filter, FlatMap, KeyBy, Map, MapBatches, Operation, Sample
from manyhands.prepare.shuffle.arrange import Arrangement, ByGroup, ByKey, ByPosition
from manyhands.prepare.shuffle.reduce import Grouped, Joined, Sorted

if TYPE_CHECKING:
    import pyarrow as pa

_JOINS = ("inner", "left", "right", "outer")


class Dataset:
    """Records, and what is done with them: each method returns a new Dataset. Functions are plain Python functions.

    A record is what a function makes of it; rows of tables and JSON objects are dicts, lines of text are `str`.
    Functions must be pure: what they return depends on their arguments alone. `write`, `take` and `count` run the job
    with the options of `How` (workers, memory, max_bad_records, engine, progress): none changes a byte of the output.

    Example:
        counts = (
            mh.Dataset.read("posts/*.jsonl.gz")
            .flat_map(lambda post: post["text"].split())
            .group_by()
            .aggregate(count=mh.Aggregate.count())
        )
        print(counts.write("out/counts", format="parquet", workers=4, memory="2GiB").digest)
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    @classmethod
    def read(
        cls,
        paths: str | Sequence[str],
        *,
        format: str | None = None,
        columns: Sequence[str] | None = None,
        types: Mapping[str, str] | None = None,
        partition_bytes: int = PARTITION_BYTES,
    ) -> Dataset:
        """The records of files: `text` (lines), `jsonl`, `parquet`, `csv`; the lines also compressed by gzip or zstd.

        paths: files, folders and globs, local or any address of fsspec (`s3://...`); they are looked up now. format:
        without it, the files' suffixes tell. columns: of Parquet files, only these. types: of CSV columns, which are
        text otherwise, such as {"age": "int64"}. partition_bytes: about how much one task reads; it decides the
        files of the output. Raises DataError if a path names no file or Parquet files differ, ConfigError for a format.
        """
        if partition_bytes < 1:
            raise ConfigError("partition_bytes is not a whole number of at least 1", got=partition_bytes)
        if format is not None and format not in FORMATS:
            raise ConfigError("there is no such input format", expected=", ".join(FORMATS), got=repr(format))
        files = find_files([paths] if isinstance(paths, str) else paths)
        splits = split_files(files, format, partition_bytes)
        return cls(
            Read(
                tuple(files),
                tuple(splits),
                None if columns is None else tuple(columns),
                dict(types or {}),
                partition_bytes,
            )
        )

    @classmethod
    def from_records(cls, records: Iterable[Any], *, partition_bytes: int = PARTITION_BYTES) -> Dataset:
        """Records that are at hand: a list, say. They travel with the plan, so let them be few."""
        held = list(records)
        step = max(1, len(held) * partition_bytes // max(1, size_bytes(held)))
        parts = tuple(tuple(held[start : start + step]) for start in range(0, len(held), step))
        return cls(Given(parts, partition_bytes))

    def map(self, function: Callable[[Any], Any]) -> Dataset:
        """`function(record)` in place of each record."""
        return self._step(Map(function))

    def flat_map(self, function: Callable[[Any], Iterable[Any]]) -> Dataset:
        """All that `function(record)` returns or yields, in place of each record."""
        return self._step(FlatMap(function))

    def filter(self, function: Callable[[Any], object]) -> Dataset:
        """The records for which `function(record)` is true."""
        return self._step(Filter(function))

    def map_batches(self, function: Callable[[Any], Any], *, form: str = "arrow") -> Dataset:
        """`function(batch)` in place of some records at a time: an Arrow table, or with form="numpy" a dict of arrays.

        It returns a table, a dict of columns or a list of records. Batches are cut by the data alone.
        """
        if form not in ("arrow", "numpy"):
            raise ConfigError("there is no such form of batches", expected="arrow, numpy", got=repr(form))
        return self._step(MapBatches(function, form))

    def key_by(self, key: Callable[[Any], Any]) -> Dataset:
        """`(key(record), record)` in place of each record."""
        return self._step(KeyBy(key))

    def sample(self, fraction: float, *, seed: int = 0) -> Dataset:
        """About this fraction of the records, chosen by their position: the same ones every time."""
        if not 0 <= fraction <= 1:
            raise ConfigError("a fraction is from 0 to 1", got=fraction)
        return self._step(Sample(fraction, seed))

    def group_by(self, key: KeyLike = None) -> GroupedDataset:
        """The records with the same key together: a function of the record, the name of a column or several, or the
        record itself.

        Keys are numbers, text, bytes or tuples of them. A record whose key is None or NaN is a bad record.
        """
        return GroupedDataset(self._node, key_from(key))

    def sort_by(self, key: KeyLike = None, *, descending: bool = False) -> Dataset:
        """In the order of keys, over all output files; records with equal keys in the order of the input.

        The key is what it is for `group_by`; keys are of one type.
        """
        arrangement = ByKey(key_from(key), f"sort by {key_name(key)}")
        return self._arranged(arrangement, Sorted(columns_of(key_from(key)), descending))

    def join(
        self,
        other: Dataset,
        on: KeyLike,
        *,
        how: str = "inner",
        other_on: KeyLike = None,
    ) -> Dataset:
        """Pairs `(record, other's record)` with the same key, in the order of the keys.

        on: the key, as for `group_by`; other_on: that of the other's records, where it's another. how: "inner", "left",
        "right", "outer": a record without a partner is dropped, or paired with None. A key may have more records than
        fit into memory, on both sides.
        """
        if how not in _JOINS:
            raise ConfigError("there is no such join", expected=", ".join(_JOINS), got=repr(how))
        keys = [key_from(on), key_from(on if other_on is None else other_on)]
        arrangements = [
            ByKey(key, f"join on {key_name(name)}") for key, name in zip(keys, (on, other_on or on), strict=True)
        ]
        by = columns_of(keys[0]) if columns_of(keys[0]) == columns_of(keys[1]) else ()
        if not by and any(map(columns_of, keys)):  # one side by columns, the other by a function: both as records
            arrangements = [
                ByKey(as_function(key), arrangement.what) for key, arrangement in zip(keys, arrangements, strict=True)
            ]
        return Dataset(Arranged((self._node, other._node), tuple(arrangements), Joined(how, by)))

    def distinct(self, key: KeyLike = None) -> Dataset:
        """The first record with each key, in the order of the keys; without a key, of each content, in some order."""
        by = content_key if key is None else key_from(key)
        grouping = Grouping(by, {"record": Aggregate.first()})
        return self._arranged(ByGroup(grouping, f"distinct {key_name(key)}"), Grouped(grouping, (), bare=True))

    def shuffle(self, seed: int) -> Dataset:
        """In an order that looks random and depends on the seed and the positions alone."""
        return self._arranged(ByPosition(seed, f"shuffle with seed {seed}"), Sorted((ORDER_COLUMN,)))

    def repartition(self) -> Dataset:
        """As they are, in partitions of even size: after a filter that left little of each, say."""
        return self._arranged(ByPosition(None, "repartition"), Sorted((ORDER_COLUMN,)))

    def cache(self, folder: str | None = None) -> Dataset:
        """Kept when they have been computed once: later jobs read them from there, without computing or parsing.

        folder: where, also for later runs of the script; without it, a temporary one as long as this process lives.
        They are read through the system's page cache: from memory, as far as there is any.
        """
        from manyhands.prepare.job.output import temporary_job_folder

        return Dataset(Cached(self._node, folder or temporary_job_folder()))

    def write(
        self,
        folder: str,
        *,
        format: str = "jsonl",
        schema: pa.Schema | None = None,
        overwrite: bool = False,
        **how: Unpack[JobOptions],
    ) -> PrepareSummary:
        """Run the job, and write its records into files of a folder, one a partition; what that came to.

        format: parquet, jsonl or text; the lines also as jsonl.gz, text.zst and so on; or tokens, for records with a
        list `tokens` each, which `mh.TokenFile` reads. schema: the columns of Parquet files; without it, those of the
        records. overwrite: replace the output of another job. how: see `How`.

        The folder's `_manifest.json` is written last: with it, the output is whole. The same call goes on where a
        killed one ended, and returns at once if the output is there. Raises DataError for data that can't be used,
        ConfigError for a folder with something else in it, WorkerError for a task that ends its workers every time.
        """
        from manyhands.prepare.job.output import write_output

        options = options_of(how)
        plan = self._plan(Output(check_format(format), schema), how)
        return write_output(plan, folder, options, overwrite=overwrite)

    def count(self, **how: Unpack[JobOptions]) -> int:
        """Run the job; how many records come out."""
        from manyhands.prepare.job.output import run_temporarily
        from manyhands.prepare.job.stages import run_stages

        options, plan = options_of(how).alone(), self._plan(Counting(), how)
        return int(
            run_temporarily(
                plan, options, lambda job, progress: run_stages(plan, plan.stages, job, options, progress)[-1].records
            )
        )

    def take(self, count: int, **how: Unpack[JobOptions]) -> list[Any]:
        """The first records. Only as much is read as that takes, unless they must be arranged."""
        from manyhands.prepare.job.output import first_records

        options, plan = options_of(how).alone(), self._plan(Counting(), how)
        return first_records(plan, count, options)

    def explain(self, *, format: str = "jsonl") -> str:
        """The plan of `write`, in that format: stages, their steps and their partitions.

        Caches that aren't there yet are shown as computed. Raises ConfigError for a format.
        """
        return make_plan(_without_caches(self._node), Output(check_format(format), None)).explain()

    @property
    def identity(self) -> str:
        """64 hex digits that stand for the records: the same as long as files, functions and options are."""
        return make_plan(_without_caches(self._node), Counting()).identity

    def _plan(self, end: Output | Counting, how: JobOptions) -> Plan:
        from manyhands.prepare.job.output import with_caches

        return make_plan(with_caches(self._node, options_of(how)), end)

    def _step(self, operation: Operation) -> Dataset:
        return Dataset(Step(self._node, operation))

    def _arranged(self, arrangement: Arrangement, reducer: Any) -> Dataset:
        return Dataset(Arranged((self._node,), (arrangement,), reducer))


class GroupedDataset:
    """Records by key: what `Dataset.group_by` returns."""

    def __init__(self, node: Node, key: Key) -> None:
        self._node, self._key = node, key

    def aggregate(self, **aggregates: Aggregate) -> Dataset:
        """A record per group, in the order of the keys: a dict of the key and one value for each aggregate.

        The key's columns have their names; what a function returns is called `key`. Aggregates are evaluated in the
        tasks that read the records first, so that only one state per group and task travels. Raises ConfigError.
        """
        names = self._key if isinstance(self._key, tuple) else ("key",)
        if not aggregates or set(names) & set(aggregates):
            raise ConfigError(
                "aggregate wants one aggregate or more, named otherwise than the key",
                got=", ".join(aggregates) or "none",
                hint="group_by(...).aggregate(count=mh.Aggregate.count())",
            )
        for name, aggregate in aggregates.items():
            if not isinstance(aggregate, Aggregate):
                raise ConfigError(f"{name} is not an Aggregate", got=type(aggregate).__name__)
        grouping = Grouping(self._key, aggregates)
        what = f"group by {key_name(self._key)}: {', '.join(aggregates)}"
        return Dataset(Arranged((self._node,), (ByGroup(grouping, what),), Grouped(grouping, names)))


def _without_caches(node: Node) -> Node:
    """The same, as if nothing were kept."""
    if isinstance(node, Step):
        return Step(_without_caches(node.parent), node.operation)
    if isinstance(node, Arranged):
        return Arranged(tuple(map(_without_caches, node.parents)), node.arrangements, node.reducer)
    return _without_caches(node.parent) if isinstance(node, Cached) else node
