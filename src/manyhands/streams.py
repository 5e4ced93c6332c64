"""Stream: data that can only be read in order, divided into a fixed number of parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from manyhands.errors import ConfigError
from manyhands.options import check_options, option, options, whole_number

TOGETHER, REPEAT = "together", "repeat"


@options
class Stream:
    """Samples that can only be read in order, for `Recipe.data`. The number of parts belongs to the recipe.

    The micro-batches of a run are counted from 0 through all of its steps. Number g is read from part g % parts, so any
    number of workers reads the same samples. A plain iterable as `Recipe.data` is read as `Stream(data)`.

    If the data have `state_dict` and `load_state_dict`, a run that is resumed continues from a recent state. Otherwise
    it reads the current pass again from its beginning, and skips the samples that the run has used. The run gets the
    same samples in both cases. If the data have `set_epoch(pass)`, it is called before each pass with the number of the
    pass, counted from 0.

    Raises ConfigError.
    """

    data: Any = option(
        in_toml=False,
        kw_only=False,
        help="What is read: a list of iterables, one for each part; or an object with num_shards and "
        "shard(num_shards, index), such as an IterableDataset of Hugging Face or a Dataset of Manyhands; or a function "
        "(part, parts) that returns an iterable; or another iterable, such as an IterableDataset of torch, in which "
        "torch.utils.data.get_worker_info() returns the part as `id` and the parts as `num_workers`. It must be "
        "possible to iterate over each of them again, with the same samples.",
    )
    parts: int | None = option(
        default=None,
        at_least=1,
        help="The number of parts. None: for shards, the largest divisor of the number of micro-batches in a step for "
        "which there are enough shards; for a list, its length; otherwise 1.",
    )
    at_end: str = option(
        default=TOGETHER,
        choices=(TOGETHER, REPEAT),
        help="What happens when a part ends. together: the next part that has not ended gives the samples in its place,"
        " and all parts begin again when all have ended, so each pass has every sample once. Without `lengths`, every "
        "worker reads all parts, because it must know where they end. repeat: the part begins again, whatever the "
        "others do. A worker reads only the parts of its own micro-batches.",
    )
    lengths: Sequence[int] | None = option(
        default=None,
        in_toml=False,
        help="The number of samples in each part, if it is known. Then a worker reads only the parts that it needs.",
    )
    shuffle: int | None = option(
        default=None,
        at_least=2,
        help="Shuffle the samples of a part within blocks of this many samples, anew in every pass. A worker keeps one "
        "block of each part that it reads in memory. None: keep the order of the data.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_stream("stream.data", self.data)
        known = self._known_parts
        if known is not None and self.parts not in (None, known):
            raise ConfigError(
                "stream.parts does not match the data",
                expected=f"{known}, as many as there are iterables",
                got=self.parts,
            )
        if self.parts is None and self.is_function:
            raise ConfigError("a stream from a function needs the number of parts", expected="parts=8, for example")
        shards = self._shards  # raises ConfigError if the data can't be divided
        if self.parts is not None and shards is not None and self.parts > shards:
            raise ConfigError(
                "the stream has more parts than its data have shards",
                expected=f"at most {shards} parts, because each part reads at least one shard",
                got=f"parts={self.parts}",
                hint="divide the data into more shards, or read them in fewer parts",
            )
        if self.lengths is not None:
            self._check_lengths(self.lengths)

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        least = 1 if self.at_end == REPEAT else 0
        checked = [whole_number(length) for length in lengths] if isinstance(lengths, Iterable) else [None]
        if any(length is None or length < least for length in checked) or not any(checked):
            raise ConfigError(
                "stream.lengths has an invalid length",
                expected=f"an integer of at least {least} for each part, not all 0",
                got=repr(lengths)[:200],
            )
        if self.parts is None and self._known_parts is None:
            raise ConfigError("stream.lengths needs stream.parts", expected=f"parts={len(checked)}", got="no parts")
        if len(checked) != (self.parts or self._known_parts):
            raise ConfigError(
                "stream.lengths does not match stream.parts",
                expected=f"{self.parts or self._known_parts} lengths",
                got=len(checked),
            )
        object.__setattr__(self, "lengths", tuple(checked))

    @property
    def _known_parts(self) -> int | None:
        return len(self.data) if isinstance(self.data, (list, tuple)) else None

    @property
    def is_function(self) -> bool:
        """Return True if the data are a function (part, parts) that returns an iterable, or a class."""
        return callable(self.data) and not _is_iterable(self.data)

    @property
    def is_divided_by_its_data(self) -> bool:
        """Return True if the data learn which part is read, and choose its samples themselves."""
        return self._known_parts is None and not has_shards(self.data)

    @property
    def _shards(self) -> int | None:
        return int(self.data.num_shards) if has_shards(self.data) else None

    def number_of_parts(self, micro_batches: int) -> int:
        """Return the number of parts for a recipe with this many micro-batches in a step."""
        if self.parts is not None:
            return self.parts
        if self._known_parts is not None:
            return self._known_parts
        most = self._shards or 1
        return max(number for number in range(1, micro_batches + 1) if micro_batches % number == 0 and number <= most)

    def facts(self, micro_batches: int) -> dict[str, str]:
        """Return the facts that decide which samples a micro-batch has. The data themselves are not among them."""
        found = {"stream.parts": str(self.number_of_parts(micro_batches)), "stream.at_end": self.at_end}
        return found | ({} if self.shuffle is None else {"stream.shuffle": str(self.shuffle)})


def has_shards(data: object) -> bool:
    """Return True if data divide themselves: `num_shards` and `shard(num_shards, index)`, as Hugging Face's do."""
    return hasattr(type(data), "num_shards") and hasattr(data, "shard")


def stream_of(name: str, data: object) -> Stream | None:
    """Return data as a stream, or None for a map-style data set. Raises ConfigError, which calls the data `name`."""
    if isinstance(data, Stream):
        return data
    refuse_data_loader(name, data)
    # An IterableDataset of torch may have a length, and Hugging Face's has __getitem__, which returns columns.
    is_iterable_only = "torch.utils.data.dataset.IterableDataset" in _classes_of(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not (is_iterable_only or isinstance(data, str)):
        return None
    if not _is_iterable(data):
        raise ConfigError(
            f"{name} is not a data set",
            expected="a map-style data set, with __len__ and __getitem__, or an iterable, which is read as a stream",
            got=type(data).__name__,
        )
    return Stream(data)


def _is_iterable(data: object) -> bool:
    return hasattr(data, "__iter__") and not isinstance(data, (str, bytes, type))


def _classes_of(data: object) -> set[str]:
    """Return the names of the classes of data. torch isn't imported, because a recipe file may be read without it."""
    return {f"{each.__module__}.{each.__name__}" for each in type(data).__mro__}


def refuse_data_loader(name: str, data: object) -> None:
    """Raise ConfigError for a DataLoader of torch, or one with a state."""
    if {"torch.utils.data.dataloader.DataLoader", "torchdata.stateful_dataloader.StatefulDataLoader"} & _classes_of(
        data
    ):
        raise ConfigError(
            f"{name} is a DataLoader",
            expected="the data set inside of it",
            got=type(data).__name__,
            hint="pass the data set itself: the recipe's batch, seed and collate replace those of a DataLoader",
        )


def check_stream(name: str, data: object) -> None:
    """Raise ConfigError if data can't be read as a stream."""
    each: Sequence[object] = data if isinstance(data, (list, tuple)) else [data]
    for inner in each or [""]:
        refuse_data_loader(name, inner)
        if hasattr(inner, "__next__"):
            raise ConfigError(
                f"{name} can be read only once",
                expected="an object that gives the same samples whenever a new iteration over it begins",
                got=f"an iterator of the type {type(inner).__name__}",
                hint="pass an object whose __iter__ is a generator function, or a function (part, parts) that returns "
                "the iterator",
            )
        if not (_is_iterable(inner) or (inner is data and callable(inner))):
            raise ConfigError(
                f"{name} can't be read as a stream",
                expected="an iterable, a list of iterables, or a function (part, parts) that returns an iterable",
                got=repr(inner)[:80],
                hint=_instead_of(inner),
            )


def _instead_of(data: object) -> str | None:
    """Return what to pass to a recipe instead of data that can't be read as a stream."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes)):
        return "pass a map-style data set as recipe.data, without manyhands.Stream"
    return "to read files, pass manyhands.Dataset.read(paths)" if isinstance(data, str) else None


def refuse_indexed(options: Mapping[str, object]) -> None:
    """Raise ConfigError if an option is set that needs data with indices and a length. options: name -> value; None if
    it is not set.
    """
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{name} can't be used with a stream",
                expected="a map-style data set, whose samples have indices and a known number",
                got=f"{name} = {value!r}",
                hint="give the number of steps; count periods in steps ('500 steps'); shuffle by "
                "manyhands.Stream(data, shuffle=1000)",
            )
