"""The lazy Dataset, whose job `write`, `take` and `count` run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex, Unpack

from manyhands.errors import ConfigError
from manyhands.prepare.arguments import (
    check_fraction,
    check_layout,
    check_schema,
    check_types,
    checked_key,
    checked_partition_bytes,
    checked_seed,
)
from manyhands.prepare.io.formats import check_output_format, check_selection, find_input, split_files
from manyhands.prepare.io.gridded_input import (
    ArrayOptions,
    check_no_options,
    checked_options,
    is_netcdf,
    plan_arrays,
    zarr_stores,
)
from manyhands.prepare.io.gridded_layout import layout_of
from manyhands.prepare.io.listing import find_files, folder_of, patterns_of
from manyhands.prepare.job.output import PrepareSummary
from manyhands.prepare.options import JobOptions, options_of
from manyhands.prepare.plan.plan import (
    PARTITION_BYTES,
    Arranged,
    Cached,
    Counting,
    InMemory,
    Node,
    Output,
    Plan,
    Read,
    Step,
    make_plan,
    store_output,
)
from manyhands.prepare.records.aggregate import Aggregate, Grouping
from manyhands.prepare.records.chunks import size_bytes
from manyhands.prepare.records.copies import pack_records
from manyhands.prepare.records.data_frames import given_records
from manyhands.prepare.records.functions import ENDS_EARLY, check_job_function, complete
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
from manyhands.prepare.shards import Shard
from manyhands.prepare.shuffle.reduce import Grouped, Joined, Sorted
from manyhands.prepare.shuffle.sort_runs import Arrangement, ByGroup, ByJoinKey, ByKey, ByPosition

if TYPE_CHECKING:
    import pyarrow as pa

    from manyhands.prepare.gridded.layout import ZarrLayout

_JOINS = ("inner", "left", "right", "outer")


class Dataset:
    """A lazy, ordered collection of records with the operations to apply to them.

    Methods such as `map`, `sort_by` and `join` compute nothing: each returns a new Dataset. `write`, `take` and `count`
    run the job. They accept the keyword arguments of `JobOptions` (workers, memory, max_bad_records, engine, progress,
    listeners). These options do not change a byte of the output.

    A record may be any Python object. Lines of text are read as `str`; JSON objects and rows of tables are read as
    dicts. The functions that a Dataset applies are plain Python functions. They must be pure: the result may depend on
    the arguments only, because a task can run more than once and on any worker. They may change the record that they
    receive. Neither a second run nor other records see the change, unless a function has put one object into several
    records. Methods raise ConfigError for an async function, and, except `flat_map`, for a generator function.

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
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        format: str | None = None,
        columns: Sequence[str] | None = None,
        types: Mapping[str, str] | None = None,
        partition_bytes: int = PARTITION_BYTES,
        **array_options: Unpack[ArrayOptions],
    ) -> Dataset:
        """Read the records of files.

        paths: files, folders and globs, as local paths or as addresses that fsspec supports (`s3://...`). They are
            resolved when `read` is called.
        format: `text` (one record per line), `jsonl`, `csv`, `parquet`, `npz`, `arrays`, `zarr` or `netcdf`. By
            default, the suffix of each file determines it, and a folder with a zarr store is recognised. The first
            three may be compressed by gzip or zstd (`.gz`, `.zst`). The records of an npz file are the first axis of
            its arrays.
        columns: the columns to read (default: all), except from text. A column that a JSON object lacks is None.
        types: the types of CSV columns, such as {"age": "int64"}; all other columns are text.
        partition_bytes: the approximate size of a task's input. It determines how the output is divided into files.
        array_options: for zarr and netCDF: `record`, `tolerance`, `absent`, `fill_value` and `integers`, as
            `ArrayOptions` describes them. Each step along the dimension `record` is a record with its coordinate and
            the arrays of the variables.

        Raises DataError if a path matches no file, or if Parquet or CSV files can't be read or have different columns.
        The folder of an output without records has no files; it is read as an empty Dataset. Raises ConfigError if
        there are no paths, or if an argument is invalid.
        """
        partition_bytes = checked_partition_bytes(partition_bytes)
        check_types(types)
        if format is not None:
            find_input(format)  # raises ConfigError if it is unknown
        patterns = patterns_of(paths)
        stores = zarr_stores(patterns, format)
        files = [] if stores else find_files(patterns)
        is_arrays = stores or format == "netcdf" or (not format and files and all(is_netcdf(f.path) for f in files))
        if is_arrays:
            form = "zarr" if stores else "netcdf"
            check_selection({form}, columns, types)
            find_input(form)  # raises ConfigError if its package is not installed
            sources = stores or [file.path for file in files]
            found = plan_arrays(sources, form, columns, partition_bytes, checked_options(array_options))
            return cls(Read(tuple(found[0]), tuple(found[1]), found[2], {}, partition_bytes))
        check_no_options(array_options)
        splits, common_columns = split_files(files, format, partition_bytes)
        columns = check_selection({split.format for split in splits}, columns, types) or common_columns
        return cls(
            Read(
                tuple(files),
                tuple(splits),
                columns,
                dict(types or {}),
                partition_bytes,
            )
        )

    @classmethod
    def from_records(cls, records: Iterable[Any], *, partition_bytes: int = PARTITION_BYTES) -> Dataset:
        """Create a Dataset from records in memory: a list or another iterable, or the rows of a table.

        records: an iterable, or a table of Arrow, pandas or Polars. The records are copied into the plan that is sent
            to every worker, so pass only a few records.

        Raises ConfigError for text, bytes, a dict, or a table with two columns of the same name. Raises DataError for a
        record that can't be pickled.
        """
        partition_bytes = checked_partition_bytes(partition_bytes)
        in_memory = given_records(complete(records) if type(records) in ENDS_EARLY else records)
        step = max(1, len(in_memory) * partition_bytes // max(1, size_bytes(in_memory)))
        parts = tuple(pack_records(in_memory[start : start + step]) for start in range(0, len(in_memory), step))
        return cls(InMemory(parts, partition_bytes))

    def map(self, function: Callable[[Any], Any]) -> Dataset:
        """Replace each record by `function(record)`."""
        check_job_function(function, "the function of map")
        return self._with_step(Map(function))

    def flat_map(self, function: Callable[[Any], Iterable[Any]]) -> Dataset:
        """Replace each record by all the records that `function(record)` returns or yields."""
        check_job_function(function, "the function of flat_map", may_generate=True)
        return self._with_step(FlatMap(function))

    def filter(self, function: Callable[[Any], object]) -> Dataset:
        """Select the records for which `function(record)` is true."""
        check_job_function(function, "the function of filter")
        return self._with_step(Filter(function))

    def map_batches(self, function: Callable[[Any], Any], *, form: str = "arrow") -> Dataset:
        """Replace each batch of records by `function(batch)`.

        function: takes an Arrow table, or a dict of NumPy arrays [rows, ...] if form="numpy". It returns a
            table, a dict of columns or a list of records. The boundaries of batches depend only on the data, not on the
            workers or the memory.

        The job ends with a DataError if NumPy can't hold a value, such as an integer beyond 2**53 beside a null. Raises
        ConfigError if `form` is unknown.
        """
        if form not in ("arrow", "numpy"):
            raise ConfigError("unknown form of batches", expected="arrow, numpy", got=repr(form))
        check_job_function(function, "the function of map_batches")
        return self._with_step(MapBatches(function, form))

    def key_by(self, key: Callable[[Any], Any]) -> Dataset:
        """Replace each record by the pair `(key(record), record)`."""
        check_job_function(key, "the key of key_by")
        return self._with_step(KeyBy(key))

    def sample(self, fraction: float, *, seed: int = 0) -> Dataset:
        """Select about this fraction of the records at random.

        The choice depends only on the seed and the positions of the records, so it is the same in every run. Raises
        ConfigError if `fraction` is not between 0 and 1, or `seed` is not an integer.
        """
        check_fraction(fraction)
        seed = checked_seed(seed)
        return self._with_step(Sample(fraction, seed))

    def group_by(self, key: KeyLike = None) -> GroupedDataset:
        """Group the records that have the same key. Call `aggregate` on the result.

        key: a function of the record, the name of a column, several such names, or None for the record itself. Keys are
        numbers, text, bytes, times or tuples of them. A record whose key has no total order, such as None or NaN, is a
        bad record (`max_bad_records`).
        """
        return GroupedDataset(self._node, checked_key(key, "group_by"))

    def sort_by(self, key: KeyLike = None, *, descending: bool = False) -> Dataset:
        """Sort the records by key, across all output files.

        The sort is stable: records with equal keys retain the order of the input, even if `descending` is true. The key
        is specified as in `group_by`. All keys must be of one type.
        """
        arrangement = ByKey(checked_key(key, "sort_by"), f"sort by {key_name(key)}")
        return self._with_shuffle(arrangement, Sorted(columns_of(key_from(key)), descending))

    def join(
        self,
        other: Dataset,
        on: KeyLike,
        *,
        how: str = "inner",
        other_on: KeyLike = None,
    ) -> Dataset:
        """Pair each record with the records of `other` that have the same key.

        The result holds tuples `(record, other_record)` in the order of the keys. On either side, a key may have more
        records than fit into memory.

        on: the key, specified as in `group_by`.
        how: "inner" drops records without a partner. "left" keeps such records of this Dataset and pairs them with
            None. "right" does this for records of `other`. "outer" does it for the records of both.
        other_on: the key of the records of `other`, if it differs from `on`.

        Raises ConfigError if `how` is unknown.
        """
        if not isinstance(other, Dataset):
            raise ConfigError("join needs another Dataset", got=repr(other)[:200], hint="use Dataset.from_records(...)")
        if how not in _JOINS:
            raise ConfigError("unknown join", expected=", ".join(_JOINS), got=repr(how))
        keys = [checked_key(each, "join") for each in (on, on if other_on is None else other_on)]
        titles = [f"join on {key_name(name)}" for name in (on, other_on or on)]
        by = columns_of(keys[0]) if columns_of(keys[0]) == columns_of(keys[1]) else ()
        if not by and any(map(columns_of, keys)):
            # The sides are not keyed by the same columns, so their tables can't be compared. Join them as records.
            keys = [as_function(key) for key in keys]
        arrangements = [ByJoinKey(key, title) for key, title in zip(keys, titles, strict=True)]
        return Dataset(Arranged((self._node, other._node), tuple(arrangements), Joined(how, by)))

    def distinct(self, key: KeyLike = None) -> Dataset:
        """Select the first record with each key, in the order of the keys.

        Without a key, records with equal content are duplicates. The order of the result is then unspecified, but the
        same in every run.
        """
        by = content_key if key is None else checked_key(key, "distinct")
        grouping = Grouping(by, {"record": Aggregate.first()})
        return self._with_shuffle(ByGroup(grouping, f"distinct {key_name(key)}"), Grouped(grouping, (), bare=True))

    def shuffle(self, seed: int) -> Dataset:
        """Shuffle the records into a pseudorandom order that depends only on the seed and their positions."""
        seed = checked_seed(seed)
        return self._with_shuffle(ByPosition(seed, f"shuffle with seed {seed}"), Sorted((ORDER_COLUMN,)))

    def repartition(self, *, partition_bytes: int | None = None) -> Dataset:
        """Divide the same records, in the same order, into partitions of about equal size.

        This is useful after a filter that left few records in each partition, and before a slow function if there are
        too few partitions for all workers.

        partition_bytes: the approximate size of the new partitions (default: twice the size of the input's partitions).
        Raises ConfigError if it is less than 1.
        """
        if partition_bytes is not None:
            partition_bytes = checked_partition_bytes(partition_bytes)
        arrangement = ByPosition(None, "repartition")
        return Dataset(Arranged((self._node,), (arrangement,), Sorted((ORDER_COLUMN,)), partition_bytes))

    def cache(self, folder: str | os.PathLike[str] | None = None) -> Dataset:
        """Store the records when they are first computed. Later jobs read the stored records without parsing them.

        folder: the folder for the records. Later runs of the script can use it again. The default is a temporary folder
        that is removed when this process exits. Cached records are read through the operating system's page cache, so
        they are read from memory if there is enough memory.
        """
        from manyhands.prepare.job.output import temporary_job_folder

        return Dataset(Cached(self._node, temporary_job_folder() if folder is None else folder_of(folder)))

    def write(
        self,
        folder: str | os.PathLike[str],
        *,
        format: str = "jsonl",
        schema: pa.Schema | None = None,
        layout: ZarrLayout | None = None,
        overwrite: bool = False,
        **job_options: Unpack[JobOptions],
    ) -> PrepareSummary:
        """Run the job and write its records into a folder, one file per partition. Return a summary.

        folder: the output folder. `_manifest.json` is written last: if it exists, the output is complete.
        format: `jsonl` or `text` (also compressed: `jsonl.gz`, `jsonl.zst`, `text.gz`, `text.zst`), `parquet`,
            `tokens`, `arrays`, `npz` or `zarr`. Each record of a `tokens` output must have a list named `tokens`;
            `mh.TokenFile` reads the files. The records of `arrays` and `npz` have numbers, times and arrays of these;
            `mh.ArrayFile` reads `arrays`, and `numpy.load` reads `npz`. `zarr` writes one store.
        schema: the columns of Parquet, `arrays` and `npz` files (default: inferred from all records). Values are never
            changed to fit it.
        layout: the variables, dimensions, coordinates and chunks of a zarr store.
        overwrite: if True, replace the output of another job. Other files are never replaced.
        job_options: workers, memory and the other `JobOptions`.

        If an earlier run of the same job was killed, the call resumes it. If the output is already complete, the call
        returns immediately.

        Raises DataError if the data can't be read, processed or written. Raises ConfigError if an option is invalid or
        the folder holds other files. Raises WorkerError if a task crashes its worker at every attempt.
        """
        from manyhands.prepare.job.output import with_caches, write_output

        options = options_of(job_options)
        check_schema(schema)
        check_layout(format, layout, schema)
        node = with_caches(self._node, options_of(job_options))
        plan = make_plan(*_ended(node, check_output_format(format), schema, layout))
        return write_output(plan, folder_of(folder), options, overwrite=overwrite)

    def count(self, **job_options: Unpack[JobOptions]) -> int:
        """Run the job and return the number of records."""
        from manyhands.prepare.job.output import run_temporarily
        from manyhands.prepare.job.stages import run_stages

        options = options_of(job_options).alone()
        plan = self._plan(job_options)
        return int(
            run_temporarily(
                plan, options, lambda job, progress: run_stages(plan, plan.stages, job, options, progress)[-1].records
            )
        )

    def take(self, count: int, **job_options: Unpack[JobOptions]) -> list[Any]:
        """Return the first `count` records.

        Only as much input is read as needed, unless the records must be sorted, grouped, joined or shuffled first.
        Raises ConfigError if `count` is not an integer of at least 0.
        """
        from manyhands.prepare.job.output import first_records

        if isinstance(count, bool) or not isinstance(count, SupportsIndex) or count.__index__() < 0:
            raise ConfigError(
                "take needs the number of records, an integer of at least 0",
                got=repr(count)[:200],
                hint="use a positive number; for the last records, sort them in the other order",
            )
        options = options_of(job_options).alone()
        plan = self._plan(job_options)
        return first_records(plan, count.__index__(), options)

    def __iter__(self) -> Iterator[Any]:
        """Compute the records one after the other in this process, without a job.

        A Dataset may also be the data of a recipe, or of `mh.Stream`; see "Streams" in the guide. Raises ConfigError
        for a Dataset that sorts, groups, joins or shuffles its records, and DataError for the first bad record.
        """
        return iter(self.shard(1, 0))

    @property
    def num_shards(self) -> int:
        """Return the largest number of parts into which `shard` divides the records: the number of input partitions."""
        return self._as_shard.num_shards

    def shard(self, num_shards: int, index: int) -> Shard:
        """Return one of `num_shards` parts of the records, as an iterable: consecutive partitions of the input.

        Raises ConfigError as iterating does.
        """
        return self._as_shard.shard(num_shards, index)

    @cached_property
    def _as_shard(self) -> Shard:
        return Shard.whole(make_plan(_without_caches(self._node), Counting()))

    def explain(self, *, format: str = "jsonl", layout: ZarrLayout | None = None) -> str:
        """Return a description of the plan that `write` would run for this format: stages, steps and partitions.

        Caches are ignored: the plan shows how their records are computed. Raises ConfigError if the format is unknown,
        or if `layout` does not fit it.
        """
        check_layout(format, layout, None)
        node = _without_caches(self._node)
        return make_plan(*_ended(node, check_output_format(format), None, layout)).explain()

    def layout(self, **changes: Any) -> ZarrLayout:
        """Return the layout of the zarr stores or netCDF files that this Dataset reads, for `write(format="zarr")`.

        It has the same variables, dimensions, coordinates and attributes, and the types of decoded values; packing is
        not kept. Variables without the dimension of records are left out.

        changes: arguments of `ZarrLayout`, which replace those of the input; `coords` and `attrs` replace or add only
            the names that they have.

        Raises ConfigError if the Dataset reads no arrays, or an argument is invalid.
        """
        node = self._node
        while isinstance(node, (Step, Cached)):
            node = node.parent
        if not isinstance(node, Read) or not any(split.arrays for split in node.splits):
            hint = "describe the output with mh.ZarrLayout(dims=..., coords=...)"
            raise ConfigError(
                "only a Dataset that reads zarr or netCDF has a layout", got=type(node).__name__, hint=hint
            )
        return layout_of(node.splits, node.columns or (), changes)

    @property
    def identity(self) -> str:
        """Return a hash (64 hex digits) that changes if the input files, the functions or their options change."""
        return make_plan(_without_caches(self._node), Counting()).identity

    def _plan(self, job_options: JobOptions) -> Plan:
        from manyhands.prepare.job.output import with_caches

        return make_plan(with_caches(self._node, options_of(job_options)), Counting())

    def _with_step(self, operation: Operation) -> Dataset:
        return Dataset(Step(self._node, operation))

    def _with_shuffle(self, arrangement: Arrangement, reducer: Any) -> Dataset:
        return Dataset(Arranged((self._node,), (arrangement,), reducer))


class GroupedDataset:
    """Records grouped by key, as `Dataset.group_by` returns them."""

    def __init__(self, node: Node, key: Key) -> None:
        self._node, self._key = node, key

    def aggregate(self, **aggregates: Aggregate) -> Dataset:
        """Return one record for each group, in the order of the keys.

        Each record is a dict that holds the key, and the value of each aggregate under the aggregate's name. A key that
        consists of columns has the names of these columns. Any other key is called `key`. Each task that reads records
        aggregates them before the shuffle, so only one state per group and task is shuffled.

        Raises ConfigError if there is no aggregate, if an aggregate has the name of a key, or if an argument is not an
        Aggregate.
        """
        names = self._key if isinstance(self._key, tuple) else ("key",)
        if not aggregates or set(names) & set(aggregates):
            raise ConfigError(
                "aggregate needs at least one aggregate, and no aggregate may have the name of a key",
                got=", ".join(aggregates) or "none",
                hint="write, for example, group_by(...).aggregate(count=mh.Aggregate.count())",
            )
        for name, aggregate in aggregates.items():
            if not isinstance(aggregate, Aggregate):
                raise ConfigError(f"{name} is not an Aggregate", got=type(aggregate).__name__)
            for argument in ("start", "add", "merge", "finish", "of"):
                function = getattr(aggregate, argument)
                if not (function is None and argument in ("finish", "of")) and not isinstance(function, str):
                    check_job_function(function, f"the function `{argument}` of aggregate {name}")
        grouping = Grouping(self._key, aggregates)
        what = f"group by {key_name(self._key)}: {', '.join(aggregates)}"
        return Dataset(Arranged((self._node,), (ByGroup(grouping, what),), Grouped(grouping, names)))


def _ended(node: Node, form: str, schema: pa.Schema | None, layout: ZarrLayout | None) -> tuple[Node, Output]:
    """Return the node and the end of a plan that writes records in this format."""
    return (node, Output(form, schema)) if layout is None else store_output(node, layout)


def _without_caches(node: Node) -> Node:
    """Return a copy of the node in which each Cached node is replaced by its parent."""
    if isinstance(node, Step):
        return Step(_without_caches(node.parent), node.operation)
    if isinstance(node, Arranged):
        return replace(node, parents=tuple(map(_without_caches, node.parents)))
    return _without_caches(node.parent) if isinstance(node, Cached) else node
