"""Loading: the same bits in any process, errors that name the samples, and no process or file left behind."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from manyhands.config import Batch, Recipe
from manyhands.data.loader import MicroBatchLoader
from manyhands.errors import ConfigError, DataError
from support.positions import sample_indices

TASKS = [(step, i) for step in range(3) for i in range(2)]


class Augmented:
    """Ten samples, each with noise from every global generator and a product whose bits could depend on threads."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.tensor([index, random.random(), float(np.random.random())], dtype=torch.float64)
        return torch.cat([noise, (torch.rand(64, 64) @ torch.rand(64, 64)).sum(0).double()])


class Numbers:
    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Together(Numbers):
    def __getitem__(self, index: int) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> list[int]:
        assert all(type(i) is int for i in indices)
        return [100 + i for i in indices]


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class Broken(Numbers):
    def __getitem__(self, index: int) -> int:
        raise Unpicklable("no sample ", str(index))


class KillsItsProcess(Numbers):
    def __getitem__(self, index: int) -> int:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def recipe(data: Any, **changes: Any) -> Recipe:
    return Recipe(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: batch,
        optimizer=lambda params: torch.optim.SGD([p for _, p in params]),
        data=data,
        batch=Batch(global_size=6, micro_size=3),
        seed=7,
        **changes,
    )


def state_of_generators() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


def shared_memory() -> set[str]:
    """Return the names in shared memory, without those of tests that run in other processes meanwhile."""
    named = ((name, re.match(r"torch_(\d+)_", name)) for name in os.listdir("/dev/shm"))
    return {name for name, pid in named if pid is None or int(pid[1]) == os.getpid() or not _runs(int(pid[1]))}


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    children, shared, handler = {*multiprocessing.active_children()}, shared_memory(), signal.getsignal(signal.SIGCHLD)
    yield
    assert {*multiprocessing.active_children()} <= children
    assert shared_memory() <= shared
    assert signal.getsignal(signal.SIGCHLD) is handler


@pytest.mark.parametrize("loader_workers", [0, 1, 3])
def test_batches_have_the_same_bits_in_any_process(loader_workers: int) -> None:
    before = state_of_generators()
    expected = {task: MicroBatchLoader(recipe(Augmented())).load(*task) for task in reversed(TASKS)}
    with MicroBatchLoader(recipe(Augmented()), loader_workers) as loader:
        for tasks in (TASKS, TASKS[::-2], []):
            loaded = list(loader.stream(tasks))
            assert [(b.step_index, b.micro_batch) for b in loaded] == tasks
            assert all(torch.equal(b.batch, expected[b.step_index, b.micro_batch]) for b in loaded)
    assert state_of_generators() == before


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_the_number_of_threads_does_not_matter(loader_workers: int) -> None:
    expected = MicroBatchLoader(recipe(Augmented())).load(0, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.rand(300, 300) @ torch.rand(300, 300)  # the pool of threads exists when the process forks
        with MicroBatchLoader(recipe(Augmented()), loader_workers) as loader:
            assert torch.equal(next(loader.stream([(0, 0)])).batch, expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_samples_come_in_order_across_epochs_and_are_collated() -> None:
    loader = MicroBatchLoader(recipe(Numbers(4)))
    seen = [i for loaded in loader.stream(TASKS) for i in loaded.batch.tolist()]
    assert seen == sample_indices(7, 4, range(18)).tolist()
    assert sorted(seen[:4]) == sorted(seen[4:8]) == [0, 1, 2, 3]


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_custom_collate_and_getitems_are_used_and_arrays_stay_arrays(loader_workers: int) -> None:
    with MicroBatchLoader(recipe(Together(), collate=np.array), loader_workers) as loader:
        batch = next(loader.stream([(0, 0)])).batch
    assert isinstance(batch, np.ndarray)
    assert batch.tolist() == [100 + i for i in sample_indices(7, 10, range(3)).tolist()]


def test_empty_data_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        MicroBatchLoader(recipe([]))


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_an_error_in_the_data_names_step_micro_batch_and_samples(loader_workers: int) -> None:
    indices = sample_indices(7, 10, range(9, 12)).tolist()
    with MicroBatchLoader(recipe(Broken()), loader_workers) as loader:
        stream = loader.stream([(1, 1), (1, 0)])
        with pytest.raises(DataError) as caught:
            next(stream)
    text = str(caught.value)
    assert f"recipe.data[{indices[0]}] raised Unpicklable: no sample {indices[0]}" in text
    assert f"step 2, micro-batch 1, samples {indices}" in text
    assert "what to do" in text
    assert f"no sample {indices[0]}" in str(caught.value.__cause__)
    assert loader_workers == 0 or "in __getitem__" in text  # the traceback of the other process


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_an_error_in_collate_is_named_and_keeps_its_type(loader_workers: int) -> None:
    def collate(items: list[Any]) -> Any:
        raise KeyError("text")

    with MicroBatchLoader(recipe(Numbers(), collate=collate), loader_workers) as loader:
        stream = loader.stream([(0, 0)])
        with pytest.raises(DataError, match=r"recipe.collate raised KeyError: 'text'") as caught:
            next(stream)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_batch_that_cannot_be_sent_is_an_error_not_a_hang() -> None:
    with MicroBatchLoader(recipe(Numbers(), collate=lambda items: lambda: items), 1) as loader:
        stream = loader.stream([(0, 0)])
        with pytest.raises(DataError, match=r"can't be sent by a loader process") as caught:
            next(stream)
    assert "step 1, micro-batch 0" in str(caught.value)


def test_long_lists_of_samples_are_shortened() -> None:
    long = dataclasses.replace(recipe(Broken(50)), batch=Batch(global_size=40, micro_size=40))
    with pytest.raises(DataError, match=r"\.\.\. 24 more\]"):
        MicroBatchLoader(long).load(0, 0)


def test_a_loader_process_killed_during_a_wait_is_named() -> None:
    with MicroBatchLoader(recipe(KillsItsProcess()), 1) as loader:
        stream = loader.stream([(0, 0)])
        with pytest.raises(DataError, match=r"loader process \d+ died: killed by SIGKILL") as caught:
            next(stream)  # would wait forever for a batch
        assert "loader_workers" in str(caught.value)
        with pytest.raises(StopIteration):
            next(stream)


def test_a_loader_process_killed_between_batches_is_named_and_loading_can_restart() -> None:
    with MicroBatchLoader(recipe(Numbers()), 2) as loader:
        stream = loader.stream((step, 0) for step in range(100))
        next(stream)
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid or 0, signal.SIGKILL)
        time.sleep(0.1)
        with pytest.raises(DataError, match=rf"loader process {victim.pid} died: killed by SIGKILL"):
            list(stream)
        assert multiprocessing.active_children() == []
        assert len(list(loader.stream(TASKS))) == len(TASKS)


def test_a_stream_in_another_thread_notices_a_killed_process() -> None:
    caught: list[BaseException] = []

    def read(loader: MicroBatchLoader) -> None:
        try:
            next(loader.stream([(0, 0)]))
        except DataError as error:
            caught.append(error)

    with MicroBatchLoader(recipe(KillsItsProcess()), 1) as loader:
        thread = threading.Thread(target=read, args=(loader,))
        thread.start()
        thread.join(240)
    assert "killed by SIGKILL" in str(caught[0])


def test_processes_serve_the_next_stream_and_the_older_stream_ends() -> None:
    with MicroBatchLoader(recipe(Numbers()), 2) as loader:
        older = loader.stream((step, 0) for step in range(50))
        next(older)
        processes = {p.pid for p in multiprocessing.active_children()}
        newer = loader.stream(TASKS)
        with pytest.raises(ConfigError, match="one stream at a time"):
            next(older)
        assert [(b.step_index, b.micro_batch) for b in newer] == TASKS
        assert {p.pid for p in multiprocessing.active_children()} == processes
    loader.close()


def test_ctrl_c_leaves_the_loader_processes_alone() -> None:
    with MicroBatchLoader(recipe(Numbers()), 1) as loader:
        stream = loader.stream(TASKS)
        next(stream)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGINT)
        assert len(list(stream)) == len(TASKS) - 1


def test_a_stopped_loader_process_is_killed_and_named() -> None:
    with MicroBatchLoader(recipe(Numbers()), 1) as loader:
        next(loader.stream(TASKS))
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGSTOP)
        with pytest.raises(DataError, match=r"killed by SIGKILL, because it was stopped for 5 s"):
            list(loader.stream((step, 0) for step in range(100)))


class HoldsTheLock(Numbers):
    """Once the file `go` is in the folder, holds Python's lock in a call of the C library, until it is killed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        if (self.folder / "go").exists():
            (self.folder / f"holds-{os.getpid()}").touch()
            ctypes.PyDLL(None).sleep(600)
        return torch.tensor(index)


def test_killed_workers_leave_no_loader_process_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, marks = tmp_path / "temporary", tmp_path / "marks"
    temporary.mkdir()
    marks.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def work() -> None:
        loader = MicroBatchLoader(recipe(HoldsTheLock(marks)), 1)
        stream = loader.stream((step, 0) for step in range(10**6))
        next(stream)  # its tensors have been sent as descriptors
        (marks / "go").touch()
        list(stream)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    while len(loaders := [int(path.name.partition("-")[2]) for path in marks.glob("holds-*")]) < 1:
        time.sleep(0.02)
    worker.kill()
    worker.join()
    deadline = time.monotonic() + 240
    while any(_runs(pid) for pid in loaders):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(temporary.iterdir()) == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Leaving(Numbers):
    """Its loader process exits with code 0."""

    def __getitem__(self, index: int) -> int:
        os._exit(0)


def test_a_loader_process_that_exits_with_code_0_has_failed() -> None:
    with (
        MicroBatchLoader(recipe(Leaving()), 1) as loader,
        pytest.raises(DataError, match=r"loader process \d+ died: it exited with code 0"),
    ):
        list(loader.stream(TASKS))
