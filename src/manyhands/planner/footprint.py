"""How many bytes a worker takes, predicted from recipe, strategy and number of workers.

Everything that grows with the model is here. Activations aren't: they depend on the batch, and neither on the
sharding nor
on the home. Nor is what torch takes for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from manyhands.comm.shared_memory import MAILBOX_BYTES
from manyhands.config import Batch, Recipe, Strategy
from manyhands.engine.sharding import REPLICATED, SHARDED, sharding_named
from manyhands.engine.step.sums import RUN
from manyhands.engine.units.gradients import IN_FLIGHT, RING_SLOTS
from manyhands.engine.units.partition import plan_units
from manyhands.layout import build_layout
from manyhands.numerics.order import OrderedSum, Subtree, maximal_subtrees, num_rounds, run_of_virtual_workers
from manyhands.offload.allocator import BEHIND_BYTES

FP32 = 4

BUILT_ITEMSIZE = FP32
"""Models are built in fp32."""

ADAMW_STATE_BYTES = 8.0
"""Of state for an element: two moments in fp32."""


@dataclass(frozen=True, kw_only=True)
class UnitSize:
    """What matters of a unit. shard_numel: elements of a worker's shard, padding included. itemsize: bytes of an
    element that the model computes with. stays: at zero3, whether it's whole as long as a micro-batch goes on."""

    shard_numel: int
    itemsize: int
    trainable: bool = True
    stays: bool = False


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one worker, the busiest; of memory that several share, its part. `peak` is their sum.

    params: the model's parameters. masters: master weights, where they aren't the parameters themselves.
    gradients: where a micro-batch's are collected, and travel. sums: of gradients, in flight.
    step_gradient: the step's, if it must be whole before the update. gathered: sharded units, while they are whole.
    workspace: runs of the update, the group's mailboxes.
    Beside these: files: on the disk, not in memory. start: in memory while the model is laid out, as its constructor
    left it, which every worker has for itself then.
    """

    params: float
    masters: float
    optimizer_state: float
    gradients: float
    sums: float
    step_gradient: float
    gathered: float
    workspace: float
    files: float
    start: float

    @property
    def peak(self) -> float:
        """In a step, beside activations. Most of it lasts as long as the engine."""
        total: float = sum(value for name, value in asdict(self).items() if name not in ("files", "start"))
        return total

    @property
    def mapped(self) -> float:
        """The most of `files` that is in this process at a time, beside what the kernel keeps while there's room."""
        return min(self.files, BEHIND_BYTES)


class Ways:
    """How that strategy goes about it with so many workers on CPUs: in words, whatever depends on sharding, home and
    group."""

    def __init__(self, strategy: Strategy, workers: int, virtual_workers: int) -> None:
        sharding = sharding_named(strategy.sharding)
        self.views = strategy.transport != "distributed"  # pieces of gradients are read where they were computed
        self.shares = self.views and workers > 1
        self.apart = strategy.offload == "disk"
        self.gathers = sharding.param is SHARDED and (self.apart or not self.views)
        self.replicates_state = sharding.optim is REPLICATED
        self.sharded_params = sharding.param is SHARDED
        self.keeps_gradients = sharding.grad is REPLICATED or (self.views and sharding.param is REPLICATED)
        self.every_step = sharding.grad is REPLICATED and not self.views and workers <= virtual_workers  # is exchanged


def sizes_of(model: nn.Module, recipe: Recipe, strategy: Strategy, workers: int) -> list[UnitSize]:
    """The units of that model, which may be on torch's meta device; all parameters may be cut. Raises ConfigError."""
    gathers = Ways(strategy, workers, recipe.batch.virtual_workers).gathers
    plans = plan_units(model, recipe.precision, strategy.units, workers=workers, gathered=gathers)
    named = [(name, param.numel()) for name, param in model.named_parameters()]
    layout = build_layout(named, [(plan.name, plan.params) for plan in plans], workers)
    return [
        UnitSize(
            shard_numel=unit.shard_numel,
            itemsize=plan.dtype.itemsize,
            trainable=plan.trainable,
            stays=not plan.modules,
        )
        for plan, unit in zip(plans, layout.units, strict=True)
    ]


def footprint(
    units: Sequence[UnitSize],
    batch: Batch,
    strategy: Strategy,
    workers: int,
    *,
    clips: bool = False,
    state_bytes: float = ADAMW_STATE_BYTES,
) -> Footprint:
    """See Footprint. clips: whether the recipe has a clip_norm. state_bytes: of the optimizer, for an element.

    strategy.transport "auto" means shared memory, and so does "hierarchical" (hosts aren't told apart).
    On a GPU, what `home` says of the host isn't told apart.
    """
    ways = Ways(strategy, workers, batch.virtual_workers)
    trained = [unit for unit in units if unit.trainable]
    shard = sum(unit.shard_numel for unit in trained)
    held_shards = workers if ways.replicates_state else 1
    shard_sums, run_buffers = _shard_sums(trained, batch, ways, workers)
    params, gradients = _params(units, ways, workers), _gradients(trained, ways, workers)
    if not strategy.overlap:  # autograd's own are all there before the first is taken
        gradients += workers * sum(unit.shard_numel * unit.itemsize for unit in trained)
    masters, state = _masters(trained, ways, held_shards), state_bytes * held_shards * shard
    local_sums = _local_sums(trained, batch, workers) if ways.every_step else 0.0
    step_gradient = 0.0
    if ways.replicates_state or clips:
        step_gradient = FP32 * shard * (1 if ways.shares else held_shards)
    # Which part of each is in memory: all, or none.
    state_here = 0 if ways.apart else 1
    params_here = state_here if ways.gathers else 1
    sums_here = state_here if ways.sharded_params else 1
    files = (1 - state_here) * (masters + state) + (1 - params_here) * params
    files += (1 - sums_here) * (shard_sums + step_gradient)
    start = params * params_here + masters * state_here
    start += state_here * BUILT_ITEMSIZE * workers * sum(unit.shard_numel for unit in units)
    if (ways.views or ways.keeps_gradients) and not ways.shares:  # shared memory is taken only when it's written
        start += gradients
    longest = held_shards * max((unit.shard_numel for unit in trained), default=0)
    return Footprint(
        params=params * params_here,
        masters=masters * state_here,
        optimizer_state=state * state_here,
        gradients=gradients,
        sums=shard_sums * sums_here + local_sums,
        step_gradient=step_gradient * sums_here,
        gathered=_gathered(units, strategy.unshard_ahead, workers) if ways.gathers else 0.0,
        workspace=_workspace(min(RUN, longest), run_buffers, state_bytes if ways.apart else 0.0, workers),
        files=files,
        start=start,
    )


def _masters(trained: Iterable[UnitSize], ways: Ways, held_shards: int) -> float:
    # In fp32 the parameters are the master weights, unless others see them while each worker keeps all of its own.
    apart = ways.replicates_state and ways.shares
    return FP32 * held_shards * sum(unit.shard_numel for unit in trained if unit.itemsize < FP32 or apart)


def _workspace(run: int, run_buffers: int, new_state_bytes: float, workers: int) -> float:
    """Of the update: a run's gradient, what a sum needs over a run and to widen a piece, and the state of a run as
    torch makes it, before it goes to a home of its own; and two mailboxes."""
    mailboxes = 2 * MAILBOX_BYTES if workers > 1 else 0
    return run * (FP32 + new_state_bytes) + FP32 * RUN * (1 + run_buffers) + mailboxes


def _params(units: Iterable[UnitSize], ways: Ways, workers: int) -> float:
    total = 0.0
    for unit in units:
        one_of_many = ways.gathers or (ways.shares and unit.trainable)
        total += unit.shard_numel * unit.itemsize * (1 if one_of_many else workers)
    return total


def _gradients(trained: Sequence[UnitSize], ways: Ways, workers: int) -> float:
    whole = [workers * unit.shard_numel * unit.itemsize for unit in trained]
    largest, travelling = max(whole, default=0), min(len(whole), IN_FLIGHT + 1)
    if ways.keeps_gradients:
        copies = 0 if ways.views or ways.every_step else travelling * largest
        return sum(whole) + copies
    if not ways.views:
        return 2 * travelling * largest  # what is given, and what is received
    rings = 0.0
    for itemsize in {unit.itemsize for unit in trained}:
        several = [workers * unit.shard_numel * itemsize for unit in trained if unit.itemsize == itemsize]
        rings += min(RING_SLOTS, len(several)) * max(several)
    return rings


def _gathered(units: Sequence[UnitSize], unshard_ahead: int, workers: int) -> float:
    """The units in use, the next ones, and those that may be used anywhere; buffers are used again by size."""
    total, of_size = 0, dict[tuple[int, int], int]()
    for unit in units:
        if unit.stays:
            total += workers * unit.shard_numel * unit.itemsize
        else:
            size = (workers * unit.shard_numel, unit.itemsize)
            of_size[size] = of_size.get(size, 0) + 1
    for (numel, itemsize), count in of_size.items():
        total += min(count, 1 + unshard_ahead) * numel * itemsize
    return total


class _Owned:
    """Counts the buffers that an ordered sum has at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def own(self, value: object) -> object:
        self.now += 1
        self.most = max(self.most, self.now)
        return self

    def free(self, value: object) -> None:
        self.now -= value is self


def _sum_of(accumulate: int, owned: _Owned) -> OrderedSum[object]:
    return OrderedSum(accumulate, own=owned.own, add=lambda left, right: left, free=owned.free)


def _shard_sums(trained: Sequence[UnitSize], batch: Batch, ways: Ways, workers: int) -> tuple[float, int]:
    """Bytes of the sums over shards, and the buffers that a sum needs over a run of the update."""
    num_bytes, run_buffers = 0.0, 0
    in_place = (len(trained) if ways.keeps_gradients else IN_FLIGHT) if ways.views else 0  # in a step's last round
    for keeps_last, units in ((True, trained[:in_place]), (False, trained[in_place:])):
        if units:
            buffers, over_a_run = _partial_sums(batch, ways, workers, keeps_last=keeps_last)
            num_bytes += FP32 * buffers * sum(unit.shard_numel for unit in units)
            run_buffers = max(run_buffers, over_a_run)
    return num_bytes, run_buffers


def _partial_sums(batch: Batch, ways: Ways, workers: int, *, keeps_last: bool) -> tuple[int, int]:
    """The buffers of an owner's sum: as long as a shard, and as long as a run of the update. keeps_last: whether the
    last round's pieces stay where they are until the update."""
    whole, run = _Owned(), _Owned()
    early, kept = batch.micro_batches, 0
    if keeps_last:
        kept = early - (num_rounds(workers, early) - 1) * workers
        early -= kept
    if ways.every_step:
        early = kept = 0
    total = _sum_of(batch.accumulate, whole)
    for _ in range(early):
        total.add_micro_batch(None)
    part = total.part(lambda value: None, own=run.own, add=lambda left, right: left, free=run.free)
    for _ in range(kept):
        part.add_micro_batch(None)
    if ways.every_step:
        for tree in sorted(tree for trees in _subtrees(batch, workers) for tree in trees):
            part.push(None, tree.level)
    part.fold()
    return whole.most, max(0, run.most - 1)  # one is where the run's total goes; fp32 may need fewer


def _subtrees(batch: Batch, workers: int) -> list[tuple[Subtree, ...]]:
    """Of each worker, where gradients are exchanged every step."""
    runs = [run_of_virtual_workers(rank, workers, batch.virtual_workers) for rank in range(workers)]
    return [maximal_subtrees(run.start, run.stop) for run in runs]


def _local_sums(trained: Sequence[UnitSize], batch: Batch, workers: int) -> float:
    """What a worker adds by itself, of whole units, and the pieces that it gets from all."""
    everyone = _subtrees(batch, workers)
    mine = 0
    for trees in everyone:
        owned = _Owned()
        for tree in trees:
            local = _sum_of(batch.accumulate, owned)
            for _ in range((tree.end - tree.start) * batch.accumulate):
                local.add_micro_batch(None)
            local.fold()
        mine = max(mine, owned.most)
    total = 0.0
    for unit in trained:
        total += mine * FP32 * unit.shard_numel * workers
        for slot in range(max(len(trees) for trees in everyone)):
            there = [trees[slot] for trees in everyone if slot < len(trees)]
            alone = batch.accumulate == 1 and all(tree.level == 0 for tree in there)
            total += len(there) * unit.shard_numel * (unit.itemsize if alone else FP32)
    return total
