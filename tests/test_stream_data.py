"""Streams of difficult data: states that can't be restored, data that fail for a moment, objects that share a state."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

import manyhands as mh
from manyhands.checkpoint.format import read_manifest
from manyhands.comm.group import Group
from manyhands.data.loader import MicroBatchLoader
from support.threads import run_threads
from test_streams import Resumable, all_of, micro_batches, recipe_of


class Rows:
    """The rows, from a position, which stays set until the rows have ended."""

    def __init__(self, rows: list[float]) -> None:
        self.rows, self.place = rows, 0

    def __iter__(self) -> Iterator[float]:
        while self.place < len(self.rows):
            self.place += 1
            yield self.rows[self.place - 1]
        self.place = 0

    def state_dict(self) -> Any:
        return {"place": self.place}

    def load_state_dict(self, state: Any) -> None:
        self.place = state["place"]


class OfIntegers(Rows):
    """JSON turns the key of the state into text."""

    def state_dict(self) -> Any:
        return {0: self.place}

    def load_state_dict(self, state: Any) -> None:
        self.place = state[0]


class WithoutState(Rows):
    def state_dict(self) -> Any:
        raise NotImplementedError


class OfTensors(Rows):
    def state_dict(self) -> Any:
        return {"place": torch.tensor(self.place)}


class OfNothing(Rows):
    def state_dict(self) -> Any:
        return None


class Late(Rows):
    def state_dict(self) -> Any:
        return {"place": self.place + 1}


class Huge(Rows):
    def state_dict(self) -> Any:
        return {"place": self.place, "more": "x" * (1 << 21)}


class Restarting(Rows):
    """As Hugging Face's data sets: a state that was loaded is the beginning of all later iterations."""

    def __init__(self, rows: list[float]) -> None:
        super().__init__(rows)
        self.start = 0

    def __iter__(self) -> Iterator[float]:
        for place in range(self.start, len(self.rows)):
            self.place = place + 1
            yield self.rows[place]

    def load_state_dict(self, state: Any) -> None:
        self.start = state["place"]


class Wrapped(IterableDataset[float]):
    """Passes its state on to the data inside."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[float]:
        yield from self.inner

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


class WrappedInList(Wrapped):
    def __init__(self, inner: Any) -> None:
        self.all = [inner]

    @property
    def inner(self) -> Any:  # type: ignore[override]
        return self.all[0]


ROWS = [[1000.0 * part + index for index in range(90)] for part in range(5)]


@pytest.mark.parametrize(
    "kind",
    [
        Rows,
        OfIntegers,
        WithoutState,
        OfTensors,
        OfNothing,
        Late,
        Huge,
        Restarting,
        lambda rows: Wrapped(Rows(rows)),
        lambda rows: Wrapped(Restarting(rows)),
        lambda rows: WrappedInList(Restarting(rows)),
    ],
)
def test_states_of_any_kind_continue_with_the_same_samples(kind: Any) -> None:
    """Across the end of a pass, because a loaded state must not show in the next pass."""

    def recipe() -> mh.Recipe:
        return recipe_of(mh.Stream([kind(rows) for rows in ROWS]), batch=mh.Batch(global_size=25, micro_size=5))

    with MicroBatchLoader(recipe()) as loader:
        first = micro_batches(loader, range(15))
        position = json.loads(json.dumps(loader.position()))
        first += micro_batches(loader, range(15, 22))
    with MicroBatchLoader(recipe()) as loader:
        loader.restore([position])
        assert micro_batches(loader, range(15, 22)) == first[15:]


class Flaky:
    """Raises once, before the given row."""

    def __init__(self, before: float) -> None:
        self.before, self.failed = before, [False]

    def __iter__(self) -> Iterator[float]:
        for value in range(10):
            if value == self.before and not self.failed[0]:
                self.failed[0] = True
                raise OSError("no route to host")
            yield float(value)


@pytest.mark.parametrize("at_end", ["together", "repeat"])
def test_a_micro_batch_can_be_read_again_after_an_error_in_its_middle(at_end: str) -> None:
    def recipe(before: float) -> mh.Recipe:
        return recipe_of(mh.Stream(Flaky(before), at_end=at_end), batch=mh.Batch(global_size=4, micro_size=4))

    with MicroBatchLoader(recipe(-1)) as loader:
        expected = [loader.load(step, 0).tolist() for step in range(5)]
    with MicroBatchLoader(recipe(6)) as loader:
        assert loader.load(0, 0).tolist() == expected[0]
        with pytest.raises(mh.DataError, match=r"(?s)no route to host.*pass 0, sample 6"):
            loader.load(1, 0)
        assert [loader.load(step, 0).tolist() for step in range(1, 5)] == expected[1:]


@pytest.mark.parametrize("shuffle", [None, 4])
def test_parts_with_the_same_samples_are_found_although_they_are_shuffled(shuffle: int | None) -> None:
    def same(part: int, parts: int) -> list[float]:
        return [float(value) for value in range(20)]

    with (
        MicroBatchLoader(recipe_of(mh.Stream(same, parts=5, shuffle=shuffle))) as loader,
        pytest.raises(mh.DataError, match="two parts of the stream have the same samples"),
    ):
        loader.facts(0, 0)


def test_parts_may_begin_alike() -> None:
    """Such as those of labels."""

    def labels(part: int, parts: int) -> list[float]:
        return [0.0, 0.0, 1.0, float(part)]

    with MicroBatchLoader(recipe_of(mh.Stream(labels, parts=5))) as loader:
        assert loader.facts(0, 0)


def test_data_that_cannot_be_copied_and_classes_are_read() -> None:
    class Pair:
        def __init__(self, part: int, parts: int) -> None:
            self.values = [10.0 * part, 10.0 * part + 1]

        def __iter__(self) -> Iterator[float]:
            return iter(self.values)

    of_class = all_of(recipe_of(mh.Stream(Pair, parts=5)), 2)
    views = [{index: 10.0 * part + index for index in range(2)}.values() for part in range(5)]
    assert (
        all_of(recipe_of(mh.Stream(views)), 2) == of_class == [[[10.0 * part + i] for part in range(5)] for i in (0, 1)]
    )


def test_data_loaders_inside_of_a_stream_are_refused() -> None:
    for data in (DataLoader([1.0]), [DataLoader([1.0])]):  # type: ignore[arg-type]
        with pytest.raises(mh.ConfigError, match=r"is a DataLoader(?s:.*)pass the data set itself"):
            mh.Stream(data)


def test_reading_a_sample_takes_no_slow_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed takes over 100 microseconds if a GPU is not in use, for its traceback."""
    recipe = recipe_of(Rows(ROWS[0]), batch=mh.Batch(global_size=64, micro_size=64))
    calls: list[int] = []
    original = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: calls.append(seed) or original(seed))
    with MicroBatchLoader(recipe) as loader:
        loader.load(0, 0)
    assert len(calls) <= 2


def test_new_loader_processes_do_not_begin_with_the_first_sample(tmp_path: Path) -> None:
    read = tmp_path / "read"
    recipe = recipe_of(mh.Stream(Resumable(10_000, read), parts=1))
    expected = all_of(recipe, 101)[100:]
    with MicroBatchLoader(recipe, loader_workers=1) as loader:
        micro_batches(loader, range(100))
        assert loader._ahead is not None
        process = loader._ahead._processes[0]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(mh.DataError, match="died"):
            micro_batches(loader, range(100, 101))
        read.unlink()
        assert micro_batches(loader, range(100, 101)) == expected
    numbers = [int(line) for line in read.read_text().splitlines()]
    assert numbers[0] > 300


def test_errors_of_a_stream_count_steps_from_1() -> None:
    def collate(samples: list[float]) -> float:
        raise ValueError("no")

    with (
        MicroBatchLoader(recipe_of(Rows(ROWS[0]), collate=collate)) as loader,
        pytest.raises(mh.DataError, match="step 1, micro-batch 0"),
    ):
        loader.load(0, 0)


def test_data_that_differ_in_each_iteration_get_a_hint_about_iterations() -> None:
    class Counting:
        count = 0

        def __iter__(self) -> Iterator[float]:
            Counting.count += 1
            return iter([float(Counting.count)] * 9)

    with (
        MicroBatchLoader(recipe_of(Counting())) as loader,
        pytest.raises(mh.DataError, match=r"not the same when it was loaded again(?s:.*)each new iteration begin anew"),
    ):
        loader.facts(0, 0)


def test_a_checkpoint_has_equal_positions_of_workers_once(tmp_path: Path) -> None:
    recipe = recipe_of(mh.Stream([Rows(rows) for rows in ROWS]))

    def run(group: Group | None) -> int:
        with mh.Engine(recipe, group=group) as engine:
            for batch in engine.batches(2):
                engine.step(batch)
            return len(read_manifest(engine.save(tmp_path)).stream)

    assert run_threads(3, run) == [1] * 3


def test_the_first_sample_of_a_pass_has_one_name() -> None:
    """However it is reached. Otherwise the check before the first step of a resumed run would find a difference."""
    with MicroBatchLoader(recipe_of(mh.Stream([list(range(5))], at_end="repeat"))) as loader:
        micro_batches(loader, range(1))
        assert "recipe.data (part 0, pass 1, sample 0)" in loader.facts(1, 0)


def expected_order(parts: list[list[float]], count: int, size: int, at_end: str) -> list[list[float]]:
    """The first `count` micro-batches, computed from the description in docs/streams.md."""
    taken, found = [0] * len(parts), []
    for number in range(count):
        found.append([])
        for _ in range(size):
            order = [(number + offset) % len(parts) for offset in range(len(parts))]
            if at_end == "together" and all(taken[part] == len(parts[part]) for part in order):
                taken = [0] * len(parts)
            part = order[0] if at_end == "repeat" else next(part for part in order if taken[part] < len(parts[part]))
            found[-1].append(parts[part][taken[part] % len(parts[part])])
            taken[part] += 1
    return found


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_lengths_stops_and_workers_give_the_described_order(draws: st.DataObject) -> None:
    draw = draws.draw
    at_end = draw(st.sampled_from(["together", "repeat"]))
    lengths = draw(st.lists(st.integers(int(at_end == "repeat"), 200), min_size=1, max_size=5).filter(any))
    parts = [[1000.0 * part + index for index in range(length)] for part, length in enumerate(lengths)]
    kind = draw(st.sampled_from([Rows, OfIntegers, WithoutState, Late, Restarting, list]))
    known = draw(st.sampled_from([None, lengths]))
    stream = mh.Stream([kind(rows) for rows in parts], at_end=at_end, lengths=known)
    number, size, steps = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    recipe = recipe_of(stream, batch=mh.Batch(global_size=number * size, micro_size=size))
    expected = expected_order(parts, number * steps, size, at_end)
    first, positions = 0, []
    while first < steps:
        stop, workers = draw(st.integers(first + 1, steps)), draw(st.integers(1, 4))
        saved = []
        for rank in range(workers):
            with MicroBatchLoader(recipe) as loader:
                loader.restore(positions)
                if draw(st.booleans()):
                    loader.facts(first, 0)
                for step_index in [first, *range(first, stop)]:  # the first one twice, as the check of the data does
                    for micro_batch in range(rank, number, workers):
                        found = loader.load(step_index, micro_batch).tolist()
                        assert found == expected[step_index * number + micro_batch]
                saved.append(json.loads(json.dumps(loader.position())))
        first, positions = stop, saved


def missing(part: int, parts: int) -> Any:
    return open(f"/no/such/file-{part}")


def no_iterable(part: int, parts: int) -> Any:
    return None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mh.Stream(missing, parts=5), r"(?s)raised FileNotFoundError.*part 0, pass 0, sample 0"),
        (lambda: mh.Stream(no_iterable, parts=5), r"(?s)raised TypeError: 'NoneType'.*part 0, pass 0, sample 0"),
        (lambda: mh.Stream([[], [1.0]], at_end="repeat"), r'(?s)too few samples.*use at_end="together"'),
        (lambda: mh.Stream([[], [1.0]], at_end="repeat", lengths=[0, 1]), r"(?s)invalid length.*at least 1 for each"),
        (lambda: mh.Stream([[1.0]], lengths=1), "invalid length"),  # type: ignore[arg-type]
    ],
)
def test_errors_name_the_part_and_what_to_do(make: Any, message: str) -> None:
    with pytest.raises((mh.DataError, mh.ConfigError), match=message):
        all_of(recipe_of(make()), 1)
