"""Buffers of gradients: no worker overwrites what another one still reads, and an early worker waits for a free buffer.

First the ring alone, then whole steps, then the meaning of a release.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import manyhands as mh
from manyhands.comm.group import AllToAll, Group
from manyhands.engine.units.gradient_buffers import IN_FLIGHT, Ring, RingGradients
from manyhands.shard_layout import BLOCK, build_layout
from oracle import oracle_run
from support.models import GPT_UNITS, gpt_recipe
from support.threads import run_threads

UNITS, ROUNDS, SIZE = 7, 3, 3
IN_ORDER = tuple(range(UNITS))
LAST_COMES_FIRST = (6, 0, 1, 2, 3, 4, 5)  # like a final norm in one unit with the embedding
TWO_EARLY = (2, 1, 0, 5, 4, 3, 6)


def value(turn: int, number: int, rank: int) -> float:
    """Return the value of a worker's gradients of a unit in a round."""
    return turn * 100 + number * 10 + rank


class Worker:
    """Collects, sends and reads as a reducer does.

    separate_buffers: how often a unit's gradients were collected outside of the ring.
    """

    def __init__(self, group: Group) -> None:
        self.rank, self.separate_buffers, self.turn = group.rank, 0, 0
        params = [(f"unit {number}", (number + 1) * BLOCK - 3) for number in IN_ORDER]  # with padding at their ends
        self.units = build_layout(params, [(name, [name]) for name, _ in params], SIZE).units
        ring = Ring(group, max(unit.padded_numel for unit in self.units), torch.float32, UNITS)
        self.in_ring = {slot.local.data_ptr() for slot in ring.slots}
        self.gradients = [RingGradients(group, unit, torch.float32, ring, n) for n, unit in enumerate(self.units)]
        self.in_flight: list[tuple[int, AllToAll]] = []

    def round(self, arrivals: tuple[int, ...], delay: float) -> None:
        for each in self.gradients:
            each.begin()
        complete, following = set[int](), 0
        for number in arrivals:
            time.sleep(delay)
            self.collect(number)
            complete.add(number)
            while following in complete:
                exchange = self.gradients[following].send(range(SIZE), f"{self.turn} / {following} / grad")
                self.in_flight.append((following, exchange))
                following += 1
                self.drain(IN_FLIGHT)
        self.drain(0)
        self.turn += 1

    def collect(self, number: int) -> None:
        place = self.gradients[number].buffer()
        self.separate_buffers += place.data_ptr() not in self.in_ring
        for slot in self.units[number].slots:
            place[slot.range.start : slot.range.end] = value(self.turn, number, self.rank)

    def drain(self, left: int) -> None:
        while len(self.in_flight) > left:
            number, exchange = self.in_flight.pop(0)
            shard = self.units[number].shard(self.rank)
            given = sum(slot.range.overlap(shard).numel for slot in self.units[number].slots)
            for rank, piece in enumerate(exchange.pieces()):
                expected = torch.zeros(piece.numel())
                expected[:given] = value(self.turn, number, rank)
                assert torch.equal(piece, expected)
            exchange.release()
            self.gradients[number].mark_read()


@pytest.mark.parametrize(
    ("arrivals", "late"),
    [(IN_ORDER, None), (IN_ORDER, 0), (IN_ORDER, 2), (LAST_COMES_FIRST, 1), (TWO_EARLY, 1), (TWO_EARLY, None)],
)
def test_all_workers_read_the_sent_values(arrivals: tuple[int, ...], late: int | None) -> None:
    """Gradients arrive in the order `arrivals` and are sent by number. late: the worker that pauses before each one."""

    def work(group: Group) -> int:
        worker = Worker(group)
        for _ in range(ROUNDS):
            worker.round(arrivals, 0.01 if group.rank == late else 0.0)
        return worker.separate_buffers

    for separate_buffers in run_threads(SIZE, work):
        if arrivals is IN_ORDER:
            assert separate_buffers == 0  # whichever worker is late
        if arrivals is LAST_COMES_FIRST:
            assert separate_buffers == ROUNDS  # the unit is too early for a buffer of the ring


def test_waiting_for_a_free_buffer_counts_as_waiting() -> None:
    others_wait = threading.Barrier(SIZE)

    def work(group: Group) -> float:
        contribution = group.empty_contribution(SIZE, torch.float32)
        exchange = group.all_to_all(contribution, 0, 1, range(SIZE), "step 0 / a / grad")
        exchange.pieces()
        group.recorder.take()
        if group.rank == 1:
            others_wait.wait(240)
            time.sleep(0.3)
            exchange.release()
        else:
            exchange.release()
            others_wait.wait(240)
        exchange.wait_reusable()
        return group.recorder.take()[1]

    early, late, _ = run_threads(SIZE, work)
    assert late < early


class Watched(AllToAll):
    """Forwards all calls and records them in `events`. delay: seconds before each release, while peers continue."""

    def __init__(self, inner: AllToAll, events: list[tuple[str, int]], delay: float) -> None:
        self._inner, self._events, self._delay = inner, events, delay
        self._number = sum(event == "begin" for event, _ in events)
        self._values: list[tuple[Tensor, Tensor]] = []
        events.append(("begin", self._number))

    @property
    def is_complete(self) -> bool:
        return self._inner.is_complete

    @property
    def is_reusable(self) -> bool:
        return self._inner.is_reusable

    def pieces(self) -> list[Tensor]:
        self._events.append(("pieces", self._number))
        pieces = self._inner.pieces()
        self._values = [(piece, piece.clone()) for piece in pieces]
        return pieces

    def release(self) -> None:
        time.sleep(self._delay)
        for piece, value in self._values:
            assert torch.equal(piece, value), f"all-to-all {self._number} was overwritten before its release"
        self._events.append(("release", self._number))
        self._inner.release()

    def wait_reusable(self) -> None:
        self._inner.wait_reusable()


@pytest.mark.parametrize(("sharding", "left"), [("ddp", 5), ("zero1", 5), ("zero2", 5), ("zero3", IN_FLIGHT)])
def test_gradients_of_the_last_round_stay_until_the_update_has_read_them(sharding: str, left: int) -> None:
    """left: how many all-to-alls of a step are read in place by the update: one per unit, or as many as the ring holds.

    Workers 0 and 1 are slow to release, one of them in each run.
    """
    recipe = gpt_recipe(batch=mh.Batch(global_size=12, micro_size=2))
    steps, rounds = 3, 2

    def work(group: Group, late: int) -> tuple[str, list[tuple[str, int]]]:
        events: list[tuple[str, int]] = []
        delay = 0.01 if group.rank == late else 0.0

        def watched(begin: Callable[..., AllToAll]) -> Callable[..., AllToAll]:
            return lambda *given: Watched(begin(*given), events, delay)

        def recorded(total: Callable[..., None]) -> Callable[..., None]:
            return lambda *given: (events.append(("update", -1)), total(*given))[1]

        group.all_to_all = watched(group.all_to_all)  # type: ignore[method-assign]
        with mh.Engine(recipe, mh.Strategy(sharding=sharding, units=GPT_UNITS), group=group) as engine:
            for shard_sum in engine._reducer.sums.values():
                shard_sum.total = recorded(shard_sum.total)  # type: ignore[method-assign]
            assert len(engine.units) == 5
            for batch in engine.batches(steps):
                engine.step(batch)
                events.append(("end", -1))
            return engine.digest(), events

    expected = oracle_run(recipe, steps).digests[-1]
    for late in (0, 1):
        for digest, events in run_threads(SIZE, partial(work, late=late)):
            assert digest == expected
            numbers = {kind: [number for event, number in events if event == kind] for kind in ("pieces", "release")}
            everything = list(range(steps * rounds * 5))
            assert numbers["pieces"] == numbers["release"] == everything  # each once, in the order of creation
            ends = [-1, *(index for index, (event, _) in enumerate(events) if event == "end")]
            for start, end in pairwise(ends):
                step = [event for event, _ in events[start + 1 : end]]
                last_read = len(step) - 1 - step[::-1].index("update")
                assert step[last_read + 1 :] == ["release"] * left


def test_a_release_declares_all_earlier_ones_read() -> None:
    """A board has one count of releases, so they must come in the order of creation."""

    def work(group: Group) -> list[tuple[bool, bool]]:
        contribution, found = group.empty_contribution(SIZE, torch.float32), []
        first = group.all_to_all(contribution, 0, 1, range(SIZE), "step 0 / a / grad")
        second = group.all_to_all(contribution, 0, 1, range(SIZE), "step 0 / b / grad")
        for call in (first, second):
            call.pieces()
        for releases in ([], [second] if group.rank == 1 else [first, second]):
            for call in releases:
                call.release()
            group.barrier("step 0 / released / control")
            found.append((first.is_reusable, second.is_reusable))
            group.barrier("step 0 / asked / control")
        return found

    assert run_threads(SIZE, work)[0] == [(False, False), (True, True)]  # though worker 1 has not released the first
