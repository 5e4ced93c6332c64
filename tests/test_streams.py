"""Streams: the same samples in the same micro-batches for any number of workers, and after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

import manyhands as mh
from manyhands.comm.group import Group
from manyhands.data.loader import MicroBatchLoader
from manyhands.data.stream_part import MARK_SAMPLES
from manyhands.data.stream_samples import StreamPosition, epochs_of
from support.threads import run_threads

LENGTHS = (7, 3, 9, 1, 5)
PARTS = [[10.0 * part + index for index in range(length)] for part, length in enumerate(LENGTHS)]


def recipe_of(data: Any, **changes: Any) -> mh.Recipe:
    given = {
        "model": lambda: nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.3), nn.Linear(4, 1)),
        "loss": lambda model, batch: model(batch.float()[:, None]).square().mean(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9),
        "data": data,
        "batch": mh.Batch(global_size=5, micro_size=1),
    }
    return mh.Recipe(**given | changes)  # type: ignore[arg-type]


class Numbers(IterableDataset[float]):
    """0, 1, 2, ... below `count`, divided between torch's workers, each plus a random number below 0.1."""

    def __init__(self, count: int) -> None:
        self.count, self.opened = count, 0

    def __iter__(self) -> Iterator[float]:
        self.opened += 1
        info = get_worker_info()
        first, stride = (0, 1) if info is None else (info.id, info.num_workers)
        for number in range(first, self.count, stride):
            yield number + 0.1 * torch.rand(()).item()


class Resumable(Numbers):
    """The same numbers, from any position. read: a file to which each number is written as it is read."""

    def __init__(self, count: int, read: Path | None = None, *, exact: bool = True) -> None:
        super().__init__(count)
        self.position, self.read, self.exact = 0, read, exact

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position if self.exact else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[float]:
        info = get_worker_info()
        first, stride = (0, 1) if info is None else (info.id, info.num_workers)
        start, self.position = self.position, 0
        for place, number in enumerate(range(first, self.count, stride)):
            self.position = place + 1
            if place < start:
                continue
            if self.read is not None:
                with self.read.open("a") as file:
                    file.write(f"{number}\n")
            yield number + 0.1 * torch.rand(()).item()


def micro_batches(loader: MicroBatchLoader, steps: range, mine: range | None = None) -> list[list[list[float]]]:
    """The samples of the given steps, by step and micro-batch. mine: those of one worker."""
    found = []
    for step in steps:
        tasks = [(step, micro_batch) for micro_batch in mine or range(5)]
        found.append([each.batch.tolist() for each in loader.stream(tasks)])
    return found


def all_of(recipe: mh.Recipe, steps: int, loader_workers: int = 0) -> list[list[list[float]]]:
    with MicroBatchLoader(recipe, loader_workers) as loader:
        return micro_batches(loader, range(steps))


def test_ended_parts_are_stepped_over_and_a_pass_has_every_sample_once() -> None:
    found = all_of(recipe_of(mh.Stream(PARTS)), 6)
    by_step = [[sample for batch in step for sample in batch] for step in found]
    assert by_step[0] == [0, 10, 20, 30, 40]
    assert by_step[1] == [1, 11, 21, 41, 42]  # part 3 has ended, so part 4 takes its place
    assert sorted(chain(*by_step[:5])) == sorted(chain(*PARTS))
    assert by_step[5] == by_step[0]


STREAMS = {
    "together": mh.Stream(PARTS),
    "lengths": mh.Stream(PARTS, lengths=LENGTHS),
    "shuffled": mh.Stream(PARTS, shuffle=4),
    "repeat": mh.Stream(PARTS, at_end="repeat"),
    "repeat, shuffled": mh.Stream(PARTS, at_end="repeat", shuffle=4),
    "an iterable in parts": mh.Stream(Numbers(33), parts=3),
    "with a state": mh.Stream(Resumable(700), parts=3, at_end="repeat"),
    "with a wrong state": mh.Stream(Resumable(700, exact=False), parts=3),
    "one part": Numbers(12),
    "a function": mh.Stream(lambda part, parts: [part + 10.0 * index for index in range(part + 2)], parts=4),
}


@pytest.mark.parametrize("name", STREAMS)
def test_workers_and_interruptions_change_no_sample(name: str) -> None:
    recipe, steps = recipe_of(STREAMS[name]), 12
    with MicroBatchLoader(recipe) as loader:
        first = micro_batches(loader, range(steps))
        for back in (11, 3, 0):  # as after a step that failed
            assert micro_batches(loader, range(back, steps)) == first[back:]
    for workers in (2, 3):
        for rank in range(workers):
            with MicroBatchLoader(recipe) as loader:
                mine = range(rank, 5, workers)
                assert micro_batches(loader, range(steps), mine) == [step[rank::workers] for step in first]
    stops = [0, 2, 3, 7, steps]
    positions: list[dict[str, Any]] = []
    for start, stop, workers in zip(stops, stops[1:], (1, 3, 2, 1), strict=False):
        found, saved = [], []
        for rank in range(workers):
            with MicroBatchLoader(recipe) as loader:
                loader.restore(positions)
                found.append(micro_batches(loader, range(start, stop), range(rank, 5, workers)))
                saved.append(json.loads(json.dumps(loader.position())))
        positions = saved
        for step in range(start, stop):
            for micro_batch in range(5):
                assert found[micro_batch % workers][step - start][micro_batch // workers] == first[step][micro_batch]


@pytest.mark.parametrize("loader_workers", [1, 2])
def test_loader_processes_change_no_sample_and_validations_load_nothing_twice(
    loader_workers: int, tmp_path: Path
) -> None:
    """Each process reads all of a part that it needs, but none goes back after a validation."""
    read = tmp_path / "read"
    recipe = recipe_of(mh.Stream(Resumable(10_000, read), parts=1))
    expected = all_of(recipe, 20)
    read.unlink()
    recipe = replace(recipe, validation=mh.Validation(data=[1.0] * 7, every="2 steps"))
    found = []
    with MicroBatchLoader(recipe, loader_workers) as loader:
        for step in range(20):
            tasks = ((later, micro_batch) for later in range(step, 20) for micro_batch in range(5))
            training = loader.stream(tasks)
            found.append([next(training).batch.tolist() for _ in range(5)])
            if step % 2:
                assert len(list(loader.stream([(0, index) for index in range(7)], "validation"))) == 7
    assert found == expected
    assert len(read.read_text().splitlines()) <= 100 * loader_workers


def test_a_resumed_stream_reads_on_from_its_state(tmp_path: Path) -> None:
    read = tmp_path / "read"
    recipe = recipe_of(mh.Stream(Resumable(10_000, read), parts=1))
    with MicroBatchLoader(recipe) as loader:
        micro_batches(loader, range(100))
        position = loader.position()
    expected = all_of(recipe, 101)[100:]
    read.unlink()
    with MicroBatchLoader(recipe) as loader:
        loader.restore([position])
        assert micro_batches(loader, range(100, 101)) == expected
    numbers = [int(line) for line in read.read_text().splitlines()]
    assert numbers[0] > 500 - 2 * MARK_SAMPLES
    assert numbers[-1] == 504


@pytest.mark.parametrize("at_end", ["together", "repeat"])
def test_a_worker_reads_only_its_own_parts_if_it_can(at_end: str) -> None:
    opened: set[int] = set()

    def part_of(part: int, parts: int) -> Iterator[float]:
        opened.add(part)
        yield from (part + 10.0 * index for index in range(100))

    lengths = [100] * 5 if at_end == "together" else None
    with MicroBatchLoader(recipe_of(mh.Stream(part_of, parts=5, at_end=at_end, lengths=lengths))) as loader:
        micro_batches(loader, range(8), range(1, 3))
    assert opened == {1, 2}


def test_the_first_line_of_a_run_states_the_parts_and_who_reads_them() -> None:
    for stream, text in (
        (mh.Stream(PARTS), "in 5 parts, all of which each worker reads"),
        (mh.Stream(PARTS, lengths=LENGTHS), "in 5 parts"),
        (mh.Stream(PARTS, at_end="repeat"), "in 5 parts"),
        (mh.Stream(Numbers(9)), ""),
    ):
        described = epochs_of(recipe_of(stream)).described(1200)
        assert described == [f"1,200 steps, 5 samples in a step, from a stream {text}".strip()]


def train_on(stream: Any, run: str, folder: str, steps: int) -> str:
    """Train for `steps` steps in total, while each worker writes down its samples."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with open(f"{folder}/{os.getpid()}", "a") as file:
            file.writelines(f"{value}\n" for value in batch.tolist())
        total: Tensor = model(batch.float()[:, None]).sum()
        return total

    return mh.train(recipe_of(stream, loss=loss), steps=steps, run_dir=run, show=False).digest


def test_a_run_is_resumed_with_other_workers(tmp_path: Path) -> None:
    """The samples of one and a half passes, by `mh.train` with checkpoints."""
    for name in ("plain", "seen"):
        (tmp_path / name).mkdir()
    stream = mh.Stream(PARTS, shuffle=3)
    plain = train_on(stream, str(tmp_path / "run-plain"), str(tmp_path / "plain"), 8)
    arguments = stream, str(tmp_path / "run"), str(tmp_path / "seen")
    train_on(*arguments, 2)
    assert mh.launch(train_on, *arguments, 8, workers=3) == [plain] * 3
    plainly, seen = (
        sorted(line for file in (tmp_path / name).iterdir() for line in file.read_text().splitlines())
        for name in ("plain", "seen")
    )
    assert plainly == seen
    assert len(seen) == 40


@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_a_stream_has_the_same_digest_for_any_workers(sharding: str, tmp_path: Path) -> None:
    recipe = recipe_of(mh.Stream(Numbers(40), parts=5, shuffle=3))

    def run(group: Group | None) -> Any:
        with mh.Engine(recipe, mh.Strategy(sharding=sharding), group) as engine:
            return [engine.step(batch, digest=True).digest for batch in engine.batches(10)]

    found = [run_threads(workers, run)[0] for workers in (1, 2, 3)]
    assert found[0] == found[1] == found[2]


# - Hugging Face's datasets, and ours


def rows_of(shards: list[int]) -> Iterator[dict[str, float]]:
    for shard in shards:
        for value in PARTS[shard]:
            yield {"value": value}


def values(rows: list[dict[str, float]]) -> Tensor:
    return torch.tensor([row["value"] for row in rows])


def test_hugging_face_shards_with_a_shuffle_buffer() -> None:
    """5 shards with 7, 3, 9, 1 and 5 rows, shuffled through a buffer of 4, 5 micro-batches of 1."""
    datasets = pytest.importorskip("datasets")
    shards = list(range(5))
    plain = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": shards})
    mapped = plain.map(lambda row: {"value": row["value"] + 0.5}).filter(lambda row: row["value"] != 20.5)
    for data in (plain.shuffle(seed=3, buffer_size=4), plain, mapped, mh.Stream(mapped, parts=1, shuffle=5)):
        recipe = recipe_of(data, collate=values)
        first = all_of(recipe, 8)
        rows = sorted(sample for step in first[:5] for sample in chain(*step))
        assert len(set(rows)) == 24 if data is mapped or isinstance(data, mh.Stream) else rows == sorted(chain(*PARTS))
        for workers in (2, 3):
            for rank in range(workers):
                with MicroBatchLoader(recipe, loader_workers=rank % 2) as loader:
                    mine = range(rank, 5, workers)
                    assert micro_batches(loader, range(8), mine) == [step[rank::workers] for step in first]
        for stop in (2, 3, 6):
            with MicroBatchLoader(recipe) as loader:
                micro_batches(loader, range(stop))
                position = json.loads(json.dumps(loader.position()))
            with MicroBatchLoader(recipe) as loader:
                loader.restore([position])
                assert micro_batches(loader, range(stop, 8)) == first[stop:]


def test_hugging_face_data_of_both_forms() -> None:
    datasets = pytest.importorskip("datasets")
    indexed = datasets.Dataset.from_dict({"value": [1.0, 2.0, 3.0, 4.0, 5.0]})
    found = all_of(recipe_of(indexed, collate=values), 1)
    assert sorted(sample for batch in found[0] for sample in batch) == [1, 2, 3, 4, 5]
    iterable = indexed.to_iterable_dataset(num_shards=2)
    recipe = recipe_of(iterable, collate=values, batch=mh.Batch(global_size=4, micro_size=2))
    assert recipe.stream is not None
    assert recipe.stream.number_of_parts(2) == 2
    with MicroBatchLoader(recipe) as loader:
        assert [loader.load(0, 0).tolist(), loader.load(0, 1).tolist()] == [[1, 2], [4, 5]]


def test_our_own_datasets(tmp_path: Path) -> None:
    for part, rows in enumerate(PARTS):
        (tmp_path / f"{part}.jsonl").write_text("".join(f'{{"value": {value}}}\n' for value in rows))
    data = mh.Dataset.read(f"{tmp_path}/*.jsonl").map(lambda row: {"value": row["value"] + 1})
    assert [row["value"] for row in data] == [value + 1 for part in PARTS for value in part]
    assert data.num_shards == 5
    recipe = recipe_of(data, collate=values)
    first = all_of(recipe, 8)
    of_lists = all_of(recipe_of(mh.Stream(PARTS)), 8)
    assert [list(chain(*step)) for step in first] == [[value + 1 for value in chain(*step)] for step in of_lists]
    with MicroBatchLoader(recipe) as loader:
        micro_batches(loader, range(3))
        position = loader.position()
    with MicroBatchLoader(recipe) as loader:
        loader.restore([position])
        assert micro_batches(loader, range(3, 8)) == first[3:]
    with pytest.raises(mh.ConfigError, match=r"can't be read record by record(?s:.*)write\(folder\)"):
        recipe_of(data.distinct())
    (tmp_path / "2.jsonl").write_text('{"value": 1}\nnot JSON\n')
    with pytest.raises(mh.DataError, match=r"(?s)recipe\.data raised DataError.*2\.jsonl, line 2"):
        all_of(recipe_of(mh.Dataset.read(f"{tmp_path}/*.jsonl"), collate=values), 2)


# - Errors


def raising(part: int, parts: int) -> Iterator[float]:
    yield 1.0
    if part == 1:
        raise ValueError("no route to host")
    yield 2.0


def test_an_error_of_the_data_names_the_sample_and_can_be_read_again() -> None:
    with MicroBatchLoader(recipe_of(mh.Stream(raising, parts=5))) as loader:
        for _ in range(2):  # the part must not look as if it had ended
            with pytest.raises(
                mh.DataError, match=r"(?s)raised ValueError: no route to host.*part 1, pass 0, sample 1"
            ):
                micro_batches(loader, range(2))


class NotIterable:
    """A map-style data set."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe_of(iter([1.0])), r"can be read only once(?s:.*)list_iterator"),
        (lambda: recipe_of(mh.Stream([iter([1.0])])), "can be read only once"),
        (lambda: recipe_of(mh.Stream([PARTS, 3])), r"can't be read as a stream(?s:.*)got: 3"),
        (lambda: recipe_of(mh.Stream(NotIterable())), r"can't be read(?s:.*)map-style data set as recipe\.data"),
        (lambda: recipe_of(mh.Stream("*.jsonl")), r"can't be read(?s:.*)manyhands\.Dataset\.read"),
        (lambda: recipe_of(3), "recipe.data is not a data set"),
        (lambda: recipe_of("text.jsonl"), "recipe.data is not a data set"),
        (lambda: recipe_of(Numbers(9), order="sequential"), r"order can't be used with a stream"),
        (lambda: recipe_of(Numbers(9), epochs=3), r"epochs can't be used with a stream(?s:.*)number of steps"),
        (lambda: recipe_of(Numbers(9), epoch_end="drop"), r"epoch_end can't be used with a stream"),
        (
            lambda: recipe_of(Numbers(9), validation=mh.Validation(data=[1.0])),
            r"validation.every can't be used with a stream(?s:.*)500 steps",
        ),
        (lambda: mh.Validation(data=Numbers(9)), r"validation.data is a stream(?s:.*)islice"),
        (lambda: mh.Stream(PARTS, parts=4), "stream.parts does not match the data"),
        (lambda: mh.Stream(raising), "needs the number of parts"),
        (lambda: mh.Stream(PARTS, lengths=[1, 2]), "stream.lengths does not match"),
        (lambda: mh.Stream(PARTS, lengths=[1, 2, 3, 4, -5]), "stream.lengths has an invalid length"),
        (lambda: mh.Stream(PARTS, at_end="stop"), r"at_end has an unknown value(?s:.*)together, repeat"),
        (lambda: mh.Stream(mh.Dataset.from_records([1]), parts=2), "more parts than its data have shards"),
    ],
)
def test_wrong_streams_are_refused(make: Any, message: str) -> None:
    with pytest.raises(mh.ConfigError, match=message):
        make()


def test_wrong_data_are_refused_before_the_first_step() -> None:
    def same(part: int, parts: int) -> list[float]:
        return [1.0, 2.0, 3.0, 4.0]

    with pytest.raises(mh.DataError, match="two parts of the stream have the same samples"):
        mh.train(recipe_of(mh.Stream(same, parts=5)), steps=1, show=False)
    with pytest.raises(mh.DataError, match=r"recipe\.data is empty"):
        mh.train(recipe_of(mh.Stream([[], []])), steps=1, show=False)
    for wrong, message in (((*LENGTHS[:4], 9), "too few samples"), ((*LENGTHS[:4], 4), "more samples than")):
        with pytest.raises(mh.DataError, match=message):
            all_of(recipe_of(mh.Stream(PARTS, lengths=wrong)), 5)


def test_a_checkpoint_of_another_stream_is_refused(tmp_path: Path) -> None:
    mh.train(recipe_of(mh.Stream(PARTS)), steps=1, run_dir=tmp_path, show=False)
    with pytest.raises(mh.CheckpointError, match=r"stream\.shuffle"):
        mh.train(recipe_of(mh.Stream(PARTS, shuffle=2)), steps=2, run_dir=tmp_path, show=False)
    for damaged in (
        {},
        {"order": [0, 0, [1], [False]], "parts": {}},
        {"order": [0, 0, [], []], "parts": {"9": [0] * 5}},
    ):
        with pytest.raises(mh.CheckpointError, match="position in the stream is damaged"):
            StreamPosition.from_json(damaged, 5)
