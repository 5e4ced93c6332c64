"""Operations of groups, with threads as workers: what arrives, in which order, and which worker an error names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.comm.group import Group
from manyhands.comm.hierarchical import HierarchicalGroup, workers_by_host
from manyhands.comm.local import LocalGroup
from manyhands.comm.shared_memory import MAILBOX_BYTES
from manyhands.comm.watched_group import WatchedGroup
from manyhands.errors import ConfigError, Position, WorkerError
from manyhands.members.membership import CLOSED, LOST_SECONDS, Peer
from support.threads import host_groups, run_threads, thread_groups

T = TypeVar("T")


def in_threads(size: int, work: Callable[[Group], T], *, stall_seconds: float = 600.0) -> list[T | BaseException]:
    """Call `work` on `size` workers; return what it returned or raised on each, by rank."""
    results: list[T | BaseException] = [AssertionError("did not end")] * size

    def run(rank: int, make: Callable[[], Group]) -> None:
        try:
            group = make()
            try:
                results[rank] = work(group)
            except BaseException as error:
                group.fail(error)
                raise
            finally:
                group.close()
        except BaseException as error:
            results[rank] = error

    makers = thread_groups(size, stall_seconds=stall_seconds)
    threads = [threading.Thread(target=run, args=(rank, make)) for rank, make in enumerate(makers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)  # long before a stall would be reported
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_all_to_all_returns_every_workers_piece_of_my_range_in_rank_order(size: int) -> None:
    def work(group: Group) -> bool:
        mine = group.empty_contribution(size * 4 + 8, torch.float32)
        for step in range(5):
            mine.local[8:] = torch.arange(size * 4) + 100 * group.rank + 1000 * step
            call = group.all_to_all(mine, 8, 4, range(size), f"step {step} / unit / grad")
            expected = [torch.arange(4.0) + 4 * group.rank + 100 * rank + 1000 * step for rank in range(size)]
            if not all(map(torch.equal, call.pieces(), expected)):
                return False
            call.release()
            call.wait_reusable()  # otherwise a fast worker would overwrite what a slow one still reads
        return True

    assert in_threads(size, work) == [True] * size


@pytest.mark.parametrize("contributors", [[0], [1, 2], [0, 2], []])
def test_only_contributors_send(contributors: list[int]) -> None:
    def work(group: Group) -> list[float]:
        mine = group.empty_contribution(3, torch.bfloat16)
        mine.local.fill_(group.rank + 1)
        call = group.all_to_all(mine, 0, 1, contributors, "a / grad")
        found = [float(piece) for piece in call.pieces()]
        call.release()
        call.wait_reusable()
        return found

    assert in_threads(3, work) == [[rank + 1.0 for rank in contributors]] * 3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_gather_brings_all_ranges_to_all_workers(size: int) -> None:
    def work(group: Group) -> bool:
        full = group.empty_replicated(size * 3, torch.float32)
        for step in range(4):
            full[group.rank * 3 : group.rank * 3 + 3] = group.rank + 10 * step
            group.all_gather(full, f"step {step} / unit / param")()
            if not torch.equal(full, (torch.arange(size) + 10 * step).repeat_interleave(3).float()):
                return False
            group.barrier(f"step {step} read / control")
        return True

    assert in_threads(size, work) == [True] * size


def test_a_replicated_buffer_is_one_physical_copy() -> None:
    def work(group: Group) -> int:
        return group.empty_replicated(10, torch.float32).data_ptr()

    assert len(set(in_threads(4, work))) == 1


@pytest.mark.parametrize("numel", [1, 1000, MAILBOX_BYTES // 4, MAILBOX_BYTES // 2 + 3])
def test_all_gather_small_copies_any_size(numel: int) -> None:
    def work(group: Group) -> bool:
        for step in range(3):
            copies = group.all_gather_small(
                torch.full((numel,), group.rank + 10 * step, dtype=torch.int32), "x / control"
            )
            if [int(copy[-1]) for copy in copies] != [rank + 10 * step for rank in range(3)]:
                return False
        return True

    assert in_threads(3, work) == [True] * 3


def test_the_recorder_counts_bytes_by_kind() -> None:
    def work(group: Group) -> dict[str, int]:
        mine = group.empty_contribution(4 * 1024, torch.bfloat16)
        call = group.all_to_all(mine, 0, 1024, range(4), "step 0 / unit / grad")
        call.pieces()
        call.release()
        call.wait_reusable()
        group.barrier("step 0 / control")
        return group.recorder.take()[0]

    assert in_threads(4, work) == [{"grad": 3 * 2048, "control": 3}] * 4


def test_a_group_of_one_is_the_identity() -> None:
    group = LocalGroup(torch.device("cpu"))
    mine = group.empty_contribution(5, torch.float32)
    mine.local.copy_(torch.arange(5))
    (piece,) = group.all_to_all(mine, 1, 4, [0], "a / grad").pieces()
    assert torch.equal(piece, torch.arange(1.0, 5.0))
    assert piece.data_ptr() == mine.local[1:].data_ptr()
    assert group.all_gather_small(torch.tensor([7]), "b / control")[0].item() == 7


def test_workers_that_make_different_calls_get_an_error() -> None:
    def work(group: Group) -> None:
        group.barrier("step 3 / left / control" if group.rank == 1 else "step 3 / right / control")

    first, second = in_threads(2, work)
    assert isinstance(first, ConfigError | WorkerError)
    assert isinstance(second, ConfigError | WorkerError)
    assert "made different collective calls" in str(first) + str(second)


def test_a_worker_that_leaves_after_its_last_call_is_not_reported() -> None:
    inspected, left = threading.Event(), threading.Event()

    def work(group: Group) -> None:
        assert isinstance(group, WatchedGroup)
        if group.rank == 1:
            assert inspected.wait(240)
            group.membership.leave()
            left.set()
            return

        def is_behind(peer: Peer) -> bool:
            inspected.set()
            return left.wait(240)  # it was behind, and has since made the call and left

        group._wait(left.is_set, is_behind, "last / control")

    assert in_threads(2, work) == [None, None]


def test_a_worker_that_raises_ends_the_others_with_its_rank_and_position() -> None:
    def work(group: Group) -> None:
        group.status("step 12 / layers.3 / grad", 12)
        if group.rank == 2:
            raise ValueError("the sky fell")
        group.barrier("step 12 / control")

    results = in_threads(4, work)
    assert isinstance(results[2], ValueError)
    for rank in (0, 1, 3):
        error = results[rank]
        assert isinstance(error, WorkerError)
        assert error.rank == 2
        assert "the sky fell" in str(error)
        assert "step 12 / layers.3 / grad" in str(error)
        assert error.position == Position("step 12 / layers.3 / grad", 12, None)


def test_a_position_can_be_read_from_the_board_and_from_a_heartbeat() -> None:
    def work(group: Group) -> list[Position]:
        assert isinstance(group, WatchedGroup)
        group.status("step 0, micro-batch 0 / data", 0, 0)
        membership = group.membership
        membership._beat(0.0)
        beat = membership._watch_store.get(f"beat/{group.rank}")
        elsewhere = Peer(rank=9, host="b", pid=1, thread=1, stack="", board=None, beat=beat)
        seen = [membership.board.position, elsewhere.position, replace(elsewhere, beat=CLOSED).position]
        group.status("end / summary")
        return [*seen, membership.board.position]

    in_step = Position("step 0, micro-batch 0 / data", 0, 0)
    assert in_threads(2, work) == [[in_step, in_step, Position(), Position("end / summary")]] * 2


@pytest.mark.parametrize("owner", ["launcher", "worker 0"])
def test_a_silent_store_is_a_failure_unless_the_launcher_of_this_host_has_it(
    monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(owner == "launcher"))

    def work(group: Group) -> str:
        assert isinstance(group, WatchedGroup)
        membership = group.membership
        membership._stop.set()
        membership._watcher.join()
        # As if the watching thread had waited for the store's answer since then.
        membership._store_answered = time.monotonic() - LOST_SECONDS - 1
        try:
            membership.check()
        except WorkerError as error:
            return error.what
        return "continues"

    expected = "continues" if owner == "launcher" else "has not answered for"
    assert all(expected in str(result) for result in in_threads(2, work))


def test_a_worker_that_stalls_is_named_with_its_stack() -> None:
    released, all_are_there = threading.Event(), threading.Barrier(3)

    def oversleep() -> None:
        released.wait(240)

    def work(group: Group) -> None:
        group.status("step 5, micro-batch 1 / forward and backward", 5, 1)
        all_are_there.wait(240)
        if group.rank == 1:
            oversleep()
        try:
            group.barrier("step 5 / control")
        finally:
            released.set()

    results = in_threads(3, work, stall_seconds=0.5)
    for rank in (0, 2):
        error = results[rank]
        assert isinstance(error, WorkerError)
        assert error.rank == 1
        assert "step 5, micro-batch 1" in str(error)
        assert error.position[1:] == (5, 1)
        assert "in oversleep" in str(error)


# - Several hosts


@st.composite
def hosts_of_workers(draw: st.DrawFn) -> list[str]:
    """The host of each worker: 2 to 5 hosts with 2 to 5 workers each, in any order."""
    hosts, workers = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    return list(draw(st.permutations([f"host {number}" for number in range(hosts)] * workers)))


@given(hosts_of_workers())
def test_ranks_are_ordered_by_position_so_that_a_positions_shards_are_contiguous(hosts: list[str]) -> None:
    by_host = workers_by_host(hosts)
    assert by_host is not None
    assert sorted(worker for workers in by_host for worker in workers) == list(range(len(hosts)))
    assert all(hosts[worker] == hosts[workers[0]] for workers in by_host for worker in workers)
    assert all(workers == sorted(workers) for workers in by_host)
    size, ranks = len(by_host[0]), set()
    for host, workers in enumerate(by_host):
        for position, worker in enumerate(workers):
            membership = SimpleNamespace(rank=worker, size=len(hosts), peers=range(len(hosts)))
            intra_host: Any = SimpleNamespace(membership=membership, device=torch.device("cpu"))
            inter_host: Any = SimpleNamespace()
            group = HierarchicalGroup(intra_host, inter_host, by_host)
            assert group.rank == position * len(by_host) + host
            assert group.workers[group.rank] == worker
            # In a buffer of one shard per rank, this position has a contiguous part: one shard per host, in order.
            part = torch.arange(len(hosts)).chunk(size)[position]
            assert part.tolist() == [group.workers.index(workers[position]) for workers in by_host]
            assert part.chunk(len(by_host))[host].tolist() == [group.rank]
            ranks.add(group.rank)
    assert ranks == set(range(len(hosts)))


@pytest.mark.parametrize(("hosts", "workers"), [(2, 2), (3, 2), (2, 3)])
def test_groups_of_hosts_gather_in_rank_order(hosts: int, workers: int) -> None:
    def work(group: Group) -> tuple[int, bool, list[int]]:
        full = group.empty_replicated(group.size * 3, torch.float32)
        full.view(-1, 3)[group.rank] = group.rank + 1.0
        group.all_gather(full, "step 0 / unit / param")()
        whole = torch.equal(full, (torch.arange(group.size) + 1.0).repeat_interleave(3))
        small = group.all_gather_small(torch.tensor([group.rank]), "step 0 / control")
        group.close()
        return group.rank, whole, [int(value) for value in small]

    everyone = list(range(hosts * workers))
    found = run_threads(hosts * workers, work, makers=host_groups(hosts, workers))
    assert found == [(position * hosts + host, True, everyone) for host in range(hosts) for position in range(workers)]
