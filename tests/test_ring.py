"""Gradients in a ring of buffers: nobody overwrites what others still read, and who is early waits for a place."""

from __future__ import annotations

import time

import pytest
import torch

from manyhands.comm.group import AllToAll, Group
from manyhands.engine.units.gradients import IN_FLIGHT, Ring, RingGradients
from manyhands.layout import BLOCK, build_layout
from support.threads import run_threads

UNITS, ROUNDS, SIZE = 7, 3, 3
IN_ORDER = tuple(range(UNITS))
LAST_COMES_FIRST = (6, 0, 1, 2, 3, 4, 5)  # as with a last norm beside the embedding
TWO_EARLY = (2, 1, 0, 5, 4, 3, 6)


def value(turn: int, number: int, rank: int) -> float:
    """What a worker gives for a unit in a round."""
    return turn * 100 + number * 10 + rank


class Worker:
    """Collects, sends and reads as a reducer does. own_places: how often a unit's gradients went beside the ring."""

    def __init__(self, group: Group) -> None:
        self.rank, self.own_places, self.turn = group.rank, 0, 0
        params = [(f"unit {number}", (number + 1) * BLOCK - 3) for number in IN_ORDER]  # with room at their ends
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
        place = self.gradients[number].place()
        self.own_places += place.data_ptr() not in self.in_ring
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
            self.gradients[number].sent()


@pytest.mark.parametrize(
    ("arrivals", "late"),
    [(IN_ORDER, None), (IN_ORDER, 0), (IN_ORDER, 2), (LAST_COMES_FIRST, 1), (TWO_EARLY, 1), (TWO_EARLY, None)],
)
def test_everyone_reads_what_was_given(arrivals: tuple[int, ...], late: int | None) -> None:
    """late: who takes its time before each gradient. They come in the order `arrivals`, and are sent by number."""

    def work(group: Group) -> int:
        worker = Worker(group)
        for _ in range(ROUNDS):
            worker.round(arrivals, 0.01 if group.rank == late else 0.0)
        return worker.own_places

    for own_places in run_threads(SIZE, work):
        if arrivals is IN_ORDER:
            assert own_places == 0  # whoever is late
        if arrivals is LAST_COMES_FIRST:
            assert own_places == ROUNDS  # it's too early for the ring


def test_waiting_for_a_place_counts_as_waiting() -> None:
    def work(group: Group) -> float:
        contribution = group.empty_contribution(SIZE, torch.float32)
        exchange = group.all_to_all(contribution, 0, 1, range(SIZE), "step 0 / a / grad")
        exchange.pieces()
        group.recorder.take()
        time.sleep(0.3 if group.rank == 1 else 0.0)
        exchange.release()
        exchange.wait_reusable()
        return group.recorder.take()[1]

    early, late, _ = run_threads(SIZE, work)
    assert late < 0.15 < early
