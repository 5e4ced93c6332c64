"""Simulates a run with islands on clusters that are uneven and get lost: how much of their speed is useful?

A discrete-event simulation of the rounds as `manyhands.training.island_rounds` makes them. Its figures are measured
ones: the time of a step, of the codec, and the bytes of files and states of a model with 69.4 M parameters. Each
cluster has a link of its own to the store, with the same bandwidth in both directions; the store itself has no limit.
Files of rounds precede states on a link. A lost cluster loses everything that is not in the store.

Everything is a pure function of its arguments. `islands_simulation_report.py` runs it, and writes docs/islands.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from random import Random

from manyhands.islands import Islands, Round
from manyhands.rounds.codec import CODEC_BLOCK

WAITING, LEASES = "waiting", "leases"


@dataclass(frozen=True)
class Setup:
    """What is simulated. Times are in seconds.

    islands, every, delay, bits: as in `manyhands.Islands`. steps: of the run. state_every: the rounds between two
    published states of an island. mbit: the bandwidth of a cluster's link in each direction, in Mbit/s.
    cluster_spread, step_spread: the standard deviations of the logarithms of a cluster's and of a step's slowness.
    loss_every: the mean time between two losses of a cluster; down: its mean time until it is back. policy: what the
    others do meanwhile, WAITING or LEASES. spares: clusters without an island, which take over. lost_after: the time
    after which a lease is lost. switch: the time to exchange islands on a cluster with several of them.

    states_beside, downloads_beside: whether a cluster computes while it sends a state, and while it receives files.
    keeps_files: whether a cluster keeps the files of rounds that others may have to repeat.
    """

    islands: int = 8
    steps: int = 3000
    every: int = 30
    delay: int = 0
    bits: int = 4
    params: float = 69.4e6
    step: float = 1.2
    codec: float = 0.5
    mbit: float = 100.0
    state_every: int = 10
    state_bytes: float = 20.0
    cluster_spread: float = 0.0
    step_spread: float = 0.0
    loss_every: float = math.inf
    down: float = 900.0
    policy: str = LEASES
    spares: int = 0
    lost_after: float = 60.0
    switch: float = 3.0
    states_beside: bool = True
    downloads_beside: bool = True
    keeps_files: bool = True

    @property
    def file_seconds(self) -> float:
        """The time to send or receive the file of an island in a round."""
        bits_each = 32 if self.bits == 32 else self.bits + 16 / CODEC_BLOCK
        return self.params * bits_each / (self.mbit * 1e6)

    @property
    def state_seconds(self) -> float:
        """The time to send or receive the state of an island."""
        return self.params * self.state_bytes * 8 / (self.mbit * 1e6)

    def rounds(self) -> list[Round]:
        """The rounds of the run, with the numbers of the steps at which they end and are applied."""
        islands = Islands(count=self.islands, every=self.every, bits=self.bits, delay=self.delay)
        return islands.rounds(self.steps, pretrained=False)


@dataclass(frozen=True)
class Loss:
    """A cluster is lost at a time, and is back after `down` seconds."""

    at: float
    down: float


@dataclass(frozen=True)
class Outcome:
    """The result. seconds: of the run. goodput: useful steps per second, relative to clusters that never wait.

    losses: how often a cluster was lost. replayed: the steps that were made again. restored: how often a cluster began
    to compute an island from a published state. bytes_up, bytes_down: of all clusters, including transfers that a loss
    cut off.
    """

    seconds: float
    goodput: float
    losses: int
    replayed: int
    restored: int
    bytes_up: float
    bytes_down: float


def slowness(setup: Setup, seed: int) -> list[float]:
    """The factor of each cluster's step time, with a mean of about 1."""
    random = Random(f"{seed} clusters")
    return [_spread(random, setup.cluster_spread) for _ in range(setup.islands + setup.spares)]


def random_losses(setup: Setup, seed: int, cluster: int) -> Iterator[Loss]:
    """The losses of a cluster, in the order of time. They don't depend on anything else in the simulation."""
    random, at = Random(f"{seed} losses {cluster}"), 0.0
    while math.isfinite(setup.loss_every):
        at += random.expovariate(1 / setup.loss_every)
        down = random.expovariate(1 / setup.down)
        yield Loss(at, down)
        at += down


def simulate(setup: Setup, seed: int = 0, losses: Callable[[int], Iterable[Loss]] | None = None) -> Outcome:
    """Simulate a run. losses: gives the losses of each cluster, instead of random ones."""
    return _Simulation(setup, seed, losses or (lambda cluster: random_losses(setup, seed, cluster))).run()


def share_out(holders: Sequence[int | None], live: Iterable[int]) -> list[int | None]:
    """Return the holder of each island: every live cluster gets the same number or one more, and few islands move."""
    shares: dict[int, list[int]] = {cluster: [] for cluster in sorted(live)}
    free: list[int] = []
    for island, holder in enumerate(holders):
        (free if holder is None else shares.get(holder, free)).append(island)
    result = list(holders)
    if not shares:
        return result
    while free:
        least = min(shares, key=lambda cluster: (len(shares[cluster]), cluster))
        shares[least].append(free.pop(0))
    while True:
        least = min(shares, key=lambda cluster: (len(shares[cluster]), cluster))
        most = max(shares, key=lambda cluster: (len(shares[cluster]), cluster))
        if len(shares[most]) - len(shares[least]) < 2:
            break
        shares[least].append(shares[most].pop())
    for cluster, islands in shares.items():
        for island in islands:
            result[island] = cluster
    return result


def _spread(random: Random, spread: float) -> float:
    return math.exp(random.gauss(-spread * spread / 2, spread)) if spread else 1.0


@dataclass
class _Link:
    """One direction of a link. Files follow each other; a state is sent in the gaps. All sizes are in seconds."""

    busy_until: float = 0.0
    state_left: float = 0.0
    used: float = 0.0

    def file(self, now: float, size: float) -> float:
        """Send a file, and return when it is there."""
        self._advance(now)
        self.busy_until = max(self.busy_until, now) + size
        self.used += size
        return self.busy_until

    def state(self, now: float, size: float) -> None:
        """Send a state, beside any other."""
        self._advance(now)
        self.state_left += size
        self.used += size

    def state_end(self, now: float) -> float:
        """Return when no state is left if no further file comes."""
        self._advance(now)
        return max(self.busy_until, now) + self.state_left

    def _advance(self, now: float) -> None:
        if now > self.busy_until:
            self.state_left = max(0.0, self.state_left - (now - self.busy_until))
            self.busy_until = now


@dataclass
class _Island:
    """What a cluster has of an island. base: the round of the state that it began from. done: the last round made."""

    base: int
    done: int


@dataclass
class _Cluster:
    """A cluster. life: the number of its losses. files: round -> bits of the islands whose files are here.

    complete: round -> when the last of its files is here. pending: rounds and islands to download after the turn.
    """

    slowness: float
    alive: bool = True
    life: int = 0
    computing: bool = False
    last_island: int | None = None
    up: _Link = field(default_factory=_Link)
    down: _Link = field(default_factory=_Link)
    islands: dict[int, _Island] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)
    complete: dict[int, float] = field(default_factory=dict)
    pending: list[tuple[int, int]] = field(default_factory=list)


class _Simulation:
    def __init__(self, setup: Setup, seed: int, losses: Callable[[int], Iterable[Loss]]) -> None:
        self._setup, self._rounds = setup, setup.rounds()
        self._clusters = [_Cluster(each) for each in slowness(setup, seed)]
        self._losses = [iter(losses(number)) for number in range(len(self._clusters))]
        self._now, self._order = 0.0, count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._all = (1 << setup.islands) - 1
        self._published: dict[int, int] = {}  # round -> bits of islands
        self._states = [0] * setup.islands  # the round of the last published state
        self._sending: list[tuple[int, int] | None] = [None] * setup.islands  # the cluster, and its life
        self._leases: list[int | None] = list(range(setup.islands))
        self._found_lost: set[int] = set()
        self._workers: list[set[int]] = [set() for _ in range(setup.islands)]
        self._lost = self._replayed = self._restored = 0
        self._up = self._down = 0.0  # seconds for which links of lost clusters were used
        self._made = [0] * setup.islands  # the last round that any cluster has made
        self._at = [_step_times(setup, seed, island) for island in range(setup.islands)]

    def run(self) -> Outcome:
        setup = self._setup
        for island in range(setup.islands):
            self._begin(island, island)
        for number in range(len(self._clusters)):
            self._next_loss(number)
        last = len(self._rounds)
        while not any(last in each.complete and each.complete[last] <= self._now for each in self._clusters):
            self._now, _, event = heapq.heappop(self._events)
            event()
        speed = sum(1 / (setup.step * each.slowness) for each in self._clusters[: setup.islands])
        rate = setup.mbit * 1e6 / 8
        return Outcome(
            self._now,
            setup.islands * setup.steps / self._now / speed,
            self._lost,
            self._replayed,
            self._restored,
            rate * (self._up + sum(each.up.used for each in self._clusters)),
            rate * (self._down + sum(each.down.used for each in self._clusters)),
        )

    def _later(self, at: float, number: int, event: Callable[[], None]) -> None:
        """Call `event` at a time, unless the cluster is lost before."""
        life = self._clusters[number].life

        def unless_lost() -> None:
            if self._clusters[number].life == life:
                event()

        heapq.heappush(self._events, (at, next(self._order), unless_lost))

    # Turns

    def _wake(self, number: int) -> None:
        """Begin the next turn of a cluster if it can."""
        cluster = self._clusters[number]
        if not cluster.alive or cluster.computing:
            return
        turns = [
            (have.done + 1, island)
            for island, have in cluster.islands.items()
            if number in self._workers[island] and have.done < len(self._rounds)
        ]
        ready = [turn for turn in turns if self._has_result(cluster, turn)]
        if ready:
            self._turn(number, *min(ready))
            return
        for turn in cluster.pending:  # a cluster whose downloads have to wait for its turn
            self._download(number, *turn)
        cluster.pending.clear()

    def _has_result(self, cluster: _Cluster, turn: tuple[int, int]) -> bool:
        round, island = turn
        return cluster.islands[island].base == round - 1 or cluster.complete.get(round - 1, math.inf) <= self._now

    def _turn(self, number: int, round: int, island: int) -> None:
        setup, cluster = self._setup, self._clusters[number]
        cluster.computing = True
        before = self._rounds[round - 2].applied if round > 1 else 0
        of, at = self._rounds[round - 1], self._at[island]
        pause = self._send_state(number, round - 1, island)
        if cluster.last_island not in (None, island):
            pause += setup.switch
        cluster.last_island = island
        if round <= self._made[island]:
            self._replayed += of.applied - before
        self._made[island] = max(self._made[island], round)
        published = self._now + pause + (at[of.end] - at[before]) * cluster.slowness + setup.codec
        self._later(published, number, lambda: self._made_file(number, round, island))
        end = published + (at[of.applied] - at[of.end]) * cluster.slowness
        self._later(end, number, lambda: self._end_turn(number, round, island))

    def _end_turn(self, number: int, round: int, island: int) -> None:
        self._clusters[number].computing = False
        self._clusters[number].islands[island].done = round
        self._wake(number)

    def _made_file(self, number: int, round: int, island: int) -> None:
        self._has_file(number, round, island, self._now)
        if self._published.get(round, 0) >> island & 1:
            return
        if self._leases[island] == number:
            self._workers[island] = {number}  # it has caught up with the cluster that computed the island before
        there = self._clusters[number].up.file(self._now, self._setup.file_seconds)
        self._later(there, number, lambda: self._publish(round, island))

    def _publish(self, round: int, island: int) -> None:
        if self._published.get(round, 0) >> island & 1:
            return
        self._published[round] = self._published.get(round, 0) | 1 << island
        for number, cluster in enumerate(self._clusters):
            if cluster.alive and (self._setup.downloads_beside or not cluster.computing):
                self._download(number, round, island)
            elif cluster.alive:
                cluster.pending.append((round, island))

    def _download(self, number: int, round: int, island: int) -> None:
        cluster = self._clusters[number]
        if not cluster.files.get(round, 0) >> island & 1:
            there = cluster.down.file(self._now, self._setup.file_seconds)
            self._has_file(number, round, island, there)

    def _has_file(self, number: int, round: int, island: int, there: float) -> None:
        cluster = self._clusters[number]
        cluster.files[round] = cluster.files.get(round, 0) | 1 << island
        if cluster.files[round] == self._all and round not in cluster.complete:
            cluster.complete[round] = max(there, cluster.down.busy_until)
            self._later(cluster.complete[round], number, lambda: self._wake(number))

    # States

    def _send_state(self, number: int, round: int, island: int) -> float:
        """Send the state of an island after a round if it is due. Return for how long the cluster has to wait."""
        setup, cluster = self._setup, self._clusters[number]
        sending = self._sending[island]
        is_sending = sending is not None and self._clusters[sending[0]].life == sending[1]
        if round % setup.state_every or round <= self._states[island] or is_sending:
            return 0.0
        self._sending[island] = (number, cluster.life)
        cluster.up.state(self._now, setup.state_seconds)
        if not setup.states_beside:
            end = cluster.up.state_end(self._now)
            self._later(end, number, lambda: self._sent_state(round, island))
            return end - self._now
        self._when_idle(number, cluster.up, lambda: self._sent_state(round, island))
        return 0.0

    def _sent_state(self, round: int, island: int) -> None:
        self._states[island], self._sending[island] = max(self._states[island], round), None

    def _when_idle(self, number: int, link: _Link, event: Callable[[], None]) -> None:
        """Call `event` when the link has sent all states."""

        def look() -> None:
            if link.state_left > 1e-9 and link.state_end(self._now) > self._now + 1e-9:
                self._when_idle(number, link, event)
            else:
                event()

        self._later(link.state_end(self._now), number, look)

    # Losses

    def _begin(self, number: int, island: int) -> None:
        """Let a cluster compute an island from its last published state."""
        cluster, base = self._clusters[number], self._states[island]
        self._workers[island].add(number)
        if not self._setup.keeps_files:
            current = max(self._published, default=0)
            for round in range(base + 1, current):
                cluster.files.pop(round, None)
                cluster.complete.pop(round, None)
        for round in range(base + 1, max(self._published, default=0) + 1):
            for each in range(self._setup.islands):
                if self._published.get(round, 0) >> each & 1:
                    self._download(number, round, each)

        def has_state() -> None:
            cluster.islands[island] = _Island(base, base)
            self._wake(number)

        if base:
            cluster.down.state(self._now, self._setup.state_seconds)
            self._when_idle(number, cluster.down, has_state)
        else:
            has_state()

    def _next_loss(self, number: int) -> None:
        loss = next(self._losses[number], None)
        if loss is not None:
            self._later(loss.at, number, lambda: self._lose(number, loss))

    def _lose(self, number: int, loss: Loss) -> None:
        self._lost += 1
        lost = self._clusters[number]
        self._up, self._down = self._up + lost.up.used, self._down + lost.down.used
        self._clusters[number] = _Cluster(lost.slowness, alive=False, life=lost.life + 1)
        for workers in self._workers:
            workers.discard(number)
        if self._setup.policy == LEASES and loss.down > self._setup.lost_after:
            self._later(self._now + self._setup.lost_after, number, lambda: self._find_lost(number))
        self._later(self._now + loss.down, number, lambda: self._return(number))

    def _find_lost(self, number: int) -> None:
        self._found_lost.add(number)
        self._share_out()

    def _return(self, number: int) -> None:
        self._clusters[number].alive = True
        self._found_lost.discard(number)
        self._share_out()
        self._next_loss(number)

    def _share_out(self) -> None:
        if self._setup.policy == LEASES:
            live = [number for number in range(len(self._clusters)) if number not in self._found_lost]
            self._leases = share_out(self._leases, live)
        for island, holder in enumerate(self._leases):
            if holder is None or not self._clusters[holder].alive:
                continue
            if holder not in self._workers[island]:
                self._restored += 1
                self._clusters[holder].islands.pop(island, None)
                self._begin(holder, island)
            elif island in self._clusters[holder].islands and self._is_newest(holder, island):
                self._workers[island] = {holder}

    def _is_newest(self, number: int, island: int) -> bool:
        return self._clusters[number].islands[island].done >= self._made[island] - 1


def _step_times(setup: Setup, seed: int, island: int) -> list[float]:
    """When each step of an island would end on a cluster of mean speed that never waits. The first is step 0."""
    random = Random(f"{seed} steps {island}")
    steps = (setup.step * _spread(random, setup.step_spread) for _ in range(setup.steps))
    return list(accumulate(steps, initial=0.0))
