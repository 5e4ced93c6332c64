"""Assigns the samples of a stream to micro-batches, and keeps the positions from which a run can continue."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from manyhands.config import Batch, Recipe
from manyhands.data.epochs import Epochs
from manyhands.data.samples import Samples, TrainingSamples
from manyhands.data.stream_part import BEGINNING, Mark, PartReader, StreamError
from manyhands.errors import CheckpointError, InvariantError
from manyhands.intervals import step_number
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import seed_generators
from manyhands.streams import REPEAT, TOGETHER, Stream

_COMPARED = range(3, 11)
"""How many samples of two parts are compared before the first step: up to 10, if each part has at least 3."""

_KEPT_STEPS = 16
"""The number of recent steps to whose beginning the order can go back. Loader processes read a few steps ahead."""


class OrderMark(NamedTuple):
    """The state of the order at the beginning of a step.

    before: the number of micro-batches before the step.
    run_pass: the current pass.
    taken: for each part, the number of samples that were taken from it in this pass.
    ended: for each part, whether it has ended in this pass.
    With at_end="repeat", parts begin their passes independently, so `run_pass` is 0 and the lists are empty.
    """

    before: int
    run_pass: int = 0
    taken: tuple[int, ...] = ()
    ended: tuple[bool, ...] = ()


class StreamPosition(NamedTuple):
    """The position from which a run can continue to read.

    order: the state of the order. parts: a mark for each part that this worker has read, not later than `order`.
    """

    order: OrderMark
    parts: dict[int, Mark]

    def as_json(self) -> dict[str, Any]:
        """Return the position as values for a checkpoint's manifest."""
        return {"order": self.order, "parts": {str(part): mark for part, mark in self.parts.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], parts: int) -> StreamPosition:
        """Return the position that `as_json` has described. Raises CheckpointError."""
        try:
            before, run_pass, taken, ended = values["order"]
            order = OrderMark(int(before), int(run_pass), tuple(map(int, taken)), tuple(map(bool, ended)))
            marks = {int(part): _mark_of(*fields) for part, fields in values["parts"].items()}
            if not (len(order.taken) == len(order.ended) and len(order.taken) in (0, parts)) or order.before < 0:
                raise ValueError("the order has other parts")
            if any(not 0 <= part < parts or min(mark[:3]) < 0 for part, mark in marks.items()):
                raise ValueError("a part is out of range")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("the checkpoint's position in the stream is damaged", got=str(error)) from error
        return cls(order, marks)

    @classmethod
    def merged(cls, positions: Sequence[StreamPosition]) -> StreamPosition:
        """Return the latest position that the marks of all workers allow. Without positions, it is the beginning."""
        parts: dict[int, Mark] = {}
        for position in positions:
            for part, mark in position.parts.items():
                parts[part] = max(parts.get(part, mark), mark, key=lambda each: each[:2])
        orders = [position.order for position in positions]
        return cls(max(orders, key=lambda order: order.before, default=OrderMark(0)), parts)


def _mark_of(run_pass: int, place: int, taken: int, state: str | None, sample: str) -> Mark:
    return Mark(int(run_pass), int(place), int(taken), None if state is None else str(state), str(sample))


class _Order(ABC):
    """The order in which a run's micro-batches take samples from the parts.

    before: the number of micro-batches that have been passed. places: the part, pass and index of each sample of the
    micro-batch that was read last.
    """

    def __init__(self, readers: Sequence[PartReader], micro_size: int) -> None:
        self._readers, self._micro_size = readers, micro_size
        self.before = 0
        self.places: list[tuple[int, int, int]] = []

    @abstractmethod
    def mark(self) -> OrderMark:
        """Return the current state."""

    @abstractmethod
    def restore(self, mark: OrderMark) -> None:
        """Go to a state."""

    @abstractmethod
    def allows(self, mark: OrderMark, part: int, of_part: Mark) -> bool:
        """Return True if a mark of a part is not later than a mark of the order."""

    @abstractmethod
    def read(self) -> list[Any]:
        """Return the samples of the next micro-batch."""

    @abstractmethod
    def pass_over(self) -> None:
        """Go to the micro-batch after the next one."""

    def _taken_from(self, part: int, take: Callable[[PartReader], Any]) -> Any:
        reader = self._readers[part]
        value = take(reader)  # may begin a pass
        self.places.append((part, reader.run_pass, reader.index - 1))
        return value


class _Together(_Order):
    """All parts begin a pass together. If a part has ended, the next part that has not ended takes its place."""

    def __init__(self, readers: Sequence[PartReader], micro_size: int, lengths: Sequence[int] | None) -> None:
        super().__init__(readers, micro_size)
        self._lengths, self._pass = lengths, 0
        self._begin_pass(0)

    def _begin_pass(self, number: int) -> None:
        self._pass, self._taken, self._ended = number, [0] * len(self._readers), [False] * len(self._readers)

    def mark(self) -> OrderMark:
        return OrderMark(self.before, self._pass, tuple(self._taken), tuple(self._ended))

    def restore(self, mark: OrderMark) -> None:
        self.before = mark.before
        self._begin_pass(mark.run_pass)
        if mark.taken:
            self._taken, self._ended = list(mark.taken), list(mark.ended)

    def allows(self, mark: OrderMark, part: int, of_part: Mark) -> bool:
        taken = mark.taken[part] if mark.taken else 0
        return (of_part.run_pass, of_part.place) <= (mark.run_pass, taken)

    def read(self) -> list[Any]:
        samples, self.places = [], []
        for _ in range(self._micro_size):
            part = self._next_part()
            self._readers[part].seek(self._pass, self._taken[part])
            samples.append(self._taken_from(part, PartReader.take))
            self._taken[part] += 1
        self.before += 1
        return samples

    def pass_over(self) -> None:
        for _ in range(self._micro_size):
            part = self._next_part()  # may begin a pass, which replaces self._taken
            self._taken[part] += 1
        self.before += 1

    def _next_part(self) -> int:
        """Return the part of the next sample of the current micro-batch. Begin a new pass if all parts have ended."""
        count = len(self._readers)
        for _ in range(2):
            for offset in range(count):
                part = (self.before + offset) % count
                if not self._ended[part]:
                    if self._has_next(part):
                        return part
                    self._ended[part] = True
            self._begin_pass(self._pass + 1)
        raise StreamError("recipe.data is empty", expected="at least one sample", got=f"{count} parts without samples")

    def _has_next(self, part: int) -> bool:
        if self._lengths is not None:
            return self._taken[part] < self._lengths[part]
        self._readers[part].seek(self._pass, self._taken[part])
        return self._readers[part].has_next()


class _Repeat(_Order):
    """Each part begins again when it ends, whatever the other parts do."""

    def mark(self) -> OrderMark:
        return OrderMark(self.before)

    def restore(self, mark: OrderMark) -> None:
        self.before = mark.before

    def allows(self, mark: OrderMark, part: int, of_part: Mark) -> bool:
        # The micro-batches before the mark that this part has given.
        count = len(range(part, mark.before, len(self._readers)))
        return of_part.taken <= count * self._micro_size

    def read(self) -> list[Any]:
        turn, part = divmod(self.before, len(self._readers))
        self.places = []
        self._readers[part].seek_taken(turn * self._micro_size)
        self.before += 1
        return [self._taken_from(part, PartReader.take_or_repeat) for _ in range(self._micro_size)]

    def pass_over(self) -> None:
        self.before += 1


class StreamSteps(Epochs):
    """The steps of a stream. They have no epochs, because the number of samples is not known."""

    def __init__(self, stream: Stream, batch: Batch) -> None:
        super().__init__(0, batch, "join")
        self._stream, self._parts = stream, stream.number_of_parts(batch.micro_batches)

    def described(self, steps: int) -> list[str]:
        number, samples = f"{steps:,} step{'' if steps == 1 else 's'}", f"{self._batch.global_size:,} samples"
        text = f"{number}, {samples} in a step, from a stream"
        if self._parts == 1:
            return [text]
        reads_all = self._stream.at_end == TOGETHER and self._stream.lengths is None
        return [f"{text} in {self._parts} parts{', all of which each worker reads' if reads_all else ''}"]

    def complete_after(self, steps: int) -> Fraction:
        raise InvariantError("a stream has no epochs")  # the recipe has refused all options that need them

    def epoch_of(self, step_index: int) -> None:
        return None


class StreamSamples(Samples):
    """A stream, divided into the micro-batches of a recipe's steps.

    Micro-batches must be read in order for speed. Going back is possible: to a recent step from the marks of this
    object, and otherwise from `base`.
    """

    name, name_of_collate = "recipe.data", "recipe.collate"
    rule = "let each new iteration begin anew, and let a sample depend on the part and on its place in it alone"

    def __init__(self, stream: Stream, recipe: Recipe) -> None:
        self._stream = stream
        self.collate, self._seed, self._micro_batches = recipe.collate, recipe.seed, recipe.batch.micro_batches
        self.parts = stream.number_of_parts(self._micro_batches)
        self.epochs = StreamSteps(stream, recipe.batch)
        self._readers = [PartReader(stream, part, self.parts, recipe.seed) for part in range(self.parts)]
        micro_size = recipe.batch.micro_size
        self._order: _Order = (
            _Repeat(self._readers, micro_size)
            if stream.at_end == REPEAT
            else _Together(self._readers, micro_size, stream.lengths)
        )
        self._base = self._order.mark()
        self._marks: dict[int, OrderMark] = {}
        self._new_marks: list[OrderMark] = []
        self._is_valid = True  # False if the order's state is wrong, because the data raised within a micro-batch

    def restore(self, position: StreamPosition) -> None:
        """Begin at a position of a checkpoint."""
        for part, reader in enumerate(self._readers):
            reader.restore(position.parts.get(part, BEGINNING))
        self._base, self._marks, self._new_marks = position.order, {}, []
        self._order.restore(position.order)
        self._is_valid = True

    def refuse_equal_parts(self) -> None:
        """Raise StreamError if the first two parts begin with the same samples, because the data ignore the part."""
        if self.parts > 1 and self._stream.is_divided_by_its_data:
            in_order = replace(self._stream, shuffle=None)  # otherwise the parts would have the same samples shuffled
            readers = [PartReader(in_order, part, self.parts, self._seed) for part in (0, 1)]
            first, second = (reader.first_hashes(_COMPARED[-1]) for reader in readers)
            if first == second and len(first) in _COMPARED:
                raise StreamError(
                    "two parts of the stream have the same samples",
                    where="recipe.data",
                    expected="data that divide their samples by torch.utils.data.get_worker_info(), or by the "
                    "arguments (part, parts)",
                    got=f"the same first {len(first)} samples in parts 0 and 1 of {self.parts}",
                    hint="let the data read only the samples of a part, or read them in one: manyhands.Stream(data)",
                )

    def names(self, step_index: int, micro_batch: int) -> list[str]:
        return [
            f"recipe.data (part {part}, pass {number}, sample {index})" for part, number, index in self._order.places
        ]

    def read(self, step_index: int, micro_batch: int) -> list[Any]:
        number = step_index * self._micro_batches + micro_batch
        if number < self._order.before or not self._is_valid:
            before = [mark for mark in (self._base, *self._marks.values()) if mark.before <= number]
            self._order.restore(max(before, key=lambda mark: mark.before, default=OrderMark(0)))
        self._is_valid = False
        while self._order.before < number:
            self._add_mark()
            self._order.pass_over()
        self._add_mark()
        samples = self._order.read()
        self._is_valid = True
        seed_generators(self.seed(step_index, micro_batch))  # for collate; reading has seeded them
        return samples

    def _add_mark(self) -> None:
        before = self._order.before
        if before % self._micro_batches == 0 and before not in self._marks:
            self._marks[before] = self._order.mark()
            self._new_marks.append(self._marks[before])
            while len(self._marks) > _KEPT_STEPS:
                del self._marks[min(self._marks)]

    def new_marks(self) -> StreamMarks:
        """Return the marks made since the last call."""
        orders, self._new_marks = self._new_marks, []
        parts = {part: marks for part, each in enumerate(self._readers) if (marks := each.new_marks())}
        return StreamMarks(orders, parts)

    def allows(self, mark: OrderMark, part: int, of_part: Mark) -> bool:
        """Return True if a mark of a part is not later than a mark of the order."""
        return self._order.allows(mark, part, of_part)

    def seed(self, step_index: int, micro_batch: int) -> int:
        return derive(self._seed, "data", step_index, micro_batch)

    def place(self, step_index: int, micro_batch: int) -> str:
        return f"step {step_number(step_index)}, micro-batch {micro_batch}"

    def listed(self, step_index: int, micro_batch: int) -> str:
        return "samples of a stream"

    def described(self, step_index: int, micro_batch: int) -> str:
        """Return a description of a micro-batch's samples, for errors in the step."""
        return f"micro-batch {micro_batch}, from a stream"


class StreamMarks(NamedTuple):
    """New marks of the order, and of each part."""

    orders: list[OrderMark]
    parts: dict[int, list[Mark]]


class StreamLog:
    """The marks of the micro-batches that this worker has received, from which a checkpoint gets its position.

    Loader processes read ahead, but their marks arrive with the micro-batches, so none is later than the step.
    """

    def __init__(self, samples: StreamSamples) -> None:
        self._samples = samples
        self.restore(StreamPosition(OrderMark(0), {}))

    def restore(self, position: StreamPosition) -> None:
        """Forget all marks, except for the position of a checkpoint."""
        self._order = position.order
        self._parts: dict[int, list[Mark]] = {part: [mark] for part, mark in position.parts.items()}

    def add(self, marks: StreamMarks) -> None:
        """Add the marks that came with a micro-batch."""
        self._order = max([self._order, *marks.orders], key=lambda mark: mark.before)
        for part, new in marks.parts.items():
            self._parts[part] = self._parts.get(part, []) + new
        for part, known in self._parts.items():
            usable = [mark for mark in known if self._samples.allows(self._order, part, mark)]
            self._parts[part] = usable[-1:] + [mark for mark in known if mark not in usable]

    def position(self) -> StreamPosition:
        """Return the latest position from which reading can continue: at or before the next step."""
        usable = {
            part: mark
            for part, known in self._parts.items()
            for mark in known[:1]
            if self._samples.allows(self._order, part, mark)
        }
        return StreamPosition(self._order, usable)


def epochs_of(recipe: Recipe) -> Epochs:
    """Return the epochs of a recipe, or the steps of its stream. Raises ConfigError."""
    stream, batch = recipe.stream, recipe.batch
    return Epochs.of(recipe) if stream is None else StreamSteps(stream, batch)


def training_samples(recipe: Recipe) -> TrainingSamples | StreamSamples:
    """Return the samples of a recipe's steps. Raises ConfigError, DataError."""
    stream = recipe.stream
    return TrainingSamples(recipe) if stream is None else StreamSamples(stream, recipe)
