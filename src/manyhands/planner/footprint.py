"""Predicts a worker's memory from the recipe, the strategy and the number of workers.

The prediction includes everything that grows with the model. It excludes torch's own memory, and activations, which
depend on the batch but not on sharding or offload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from manyhands.comm.shared_memory import MAILBOX_BYTES
from manyhands.config import Batch, Recipe, Strategy
from manyhands.engine.sharding import REPLICATED, SHARDED, sharding_named
from manyhands.engine.step.gradient_sums import RUN
from manyhands.engine.units.gradient_buffers import IN_FLIGHT, RING_SLOTS
from manyhands.engine.units.unit_plan import plan_units
from manyhands.numerics.ordered_sum import OrderedSum, Subtree, maximal_subtrees, num_rounds, run_of_virtual_workers
from manyhands.offload.allocator import BEHIND_BYTES
from manyhands.shard_layout import build_layout

FP32 = 4

BUILT_ITEMSIZE = FP32
"""Models are built in fp32."""

ADAMW_STATE_BYTES = 8.0
"""The state per element: two moments in fp32."""


@dataclass(frozen=True, kw_only=True)
class UnitSize:
    """The sizes of a unit.

    shard_numel: elements of a worker's shard, with padding. itemsize: bytes of an element of the parameters.
    stays: with zero3, True if the unit stays unsharded during a micro-batch.
    """

    shard_numel: int
    itemsize: int
    trainable: bool = True
    stays: bool = False


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The bytes of the worker that takes the most memory, including its part of shared memory.

    `peak` is the sum of all values except files and start.
    params: the model's parameters. masters: master weights, unless they are an alias of the parameters. average: the
    average of the weights.
    gradients: buffers in which a micro-batch's gradients are collected and sent. sums: sums of gradients in flight.
    step_gradient: the step's gradient, if the update needs all of it before it starts. unsharded: sharded units while
    they are unsharded. workspace: the update's buffers, and the group's mailboxes.
    files: bytes on disk, not in memory. start: bytes in memory while the model is laid out, when each worker has its
    own copy of the model.
    """

    params: float
    masters: float
    average: float
    optimizer_state: float
    gradients: float
    sums: float
    step_gradient: float
    unsharded: float
    workspace: float
    files: float
    start: float

    @property
    def peak(self) -> float:
        """Return the peak in a step, without activations. Most of it lasts as long as the engine."""
        total: float = sum(value for name, value in asdict(self).items() if name not in ("files", "start"))
        return total

    @property
    def mapped(self) -> float:
        """Return the largest part of `files` that this process maps at a time.

        The kernel may cache more in free memory.
        """
        return min(self.files, BEHIND_BYTES)


class Ways:
    """The properties of a strategy, on a number of CPU workers, that depend on sharding, offload and transport.

    views: True if pieces of gradients are read in place, without a copy.
    shares: True if workers share one copy of replicated buffers.
    unshards: True if parameters are unsharded on demand.
    reduces_every_step: True if gradients are exchanged once per step, not once per micro-batch.
    """

    def __init__(self, strategy: Strategy, workers: int, virtual_workers: int) -> None:
        sharding = sharding_named(strategy.sharding)
        self.views = strategy.transport != "distributed"
        self.shares = self.views and workers > 1
        self.on_disk = strategy.offload == "disk"
        self.unshards = sharding.param is SHARDED and (self.on_disk or not self.views)
        self.replicates_state = sharding.optim is REPLICATED
        self.sharded_params = sharding.param is SHARDED
        self.retains_gradients = sharding.grad is REPLICATED or (self.views and sharding.param is REPLICATED)
        self.reduces_every_step = sharding.grad is REPLICATED and not self.views and workers <= virtual_workers


def sizes_of(model: nn.Module, recipe: Recipe, strategy: Strategy, workers: int) -> list[UnitSize]:
    """Return the sizes of a model's units for an elementwise optimizer. The model may be on the meta device.

    A per-parameter optimizer may need somewhat larger shards, because each of its parameters lies in one shard. This
    function ignores that. Raises ConfigError.
    """
    unshards = Ways(strategy, workers, recipe.batch.virtual_workers).unshards
    plans = plan_units(model, recipe.precision, strategy.units, workers=workers, on_demand=unshards)
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
    averages: bool = False,
    state_bytes: float = ADAMW_STATE_BYTES,
) -> Footprint:
    """Predict the memory of a worker. Pure.

    clips: True if the recipe has a clip_norm. averages: True if it has an average of the weights.
    state_bytes: optimizer state per element.
    The transports "auto" and "hierarchical" are treated as shared memory on one host. On a GPU, host memory and device
    memory are added up.
    """
    ways = Ways(strategy, workers, batch.virtual_workers)
    trained = [unit for unit in units if unit.trainable]
    shard = sum(unit.shard_numel for unit in trained)
    held_shards = workers if ways.replicates_state else 1
    shard_sums, run_buffers = _shard_sums(trained, batch, ways, workers)
    params, gradients = _params(units, ways, workers), _gradients(trained, ways, workers)
    if not strategy.overlap:  # autograd holds all gradients before the first is collected
        gradients += workers * sum(unit.shard_numel * unit.itemsize for unit in trained)
    masters, state = _masters(trained, ways, held_shards), state_bytes * held_shards * shard
    average = float(FP32 * held_shards * shard if averages else 0)
    local_sums = _local_sums(trained, batch, workers) if ways.reduces_every_step else 0.0
    step_gradient = 0.0
    if ways.replicates_state or clips:
        step_gradient = FP32 * shard * (1 if ways.shares else held_shards)
    # Each factor is 1 if its part of the state is in memory, and 0 if that part is in files.
    state_here = 0 if ways.on_disk else 1
    params_here = state_here if ways.unshards else 1
    sums_here = state_here if ways.sharded_params else 1
    files = (1 - state_here) * (masters + average + state) + (1 - params_here) * params
    files += (1 - sums_here) * (shard_sums + step_gradient)
    start = params * params_here + masters * state_here
    start += state_here * BUILT_ITEMSIZE * workers * sum(unit.shard_numel for unit in units)
    # Shared memory takes no space before something is written to it.
    if (ways.views or ways.retains_gradients) and not ways.shares:
        start += gradients
    longest = held_shards * max((unit.shard_numel for unit in trained), default=0)
    return Footprint(
        params=params * params_here,
        masters=masters * state_here,
        average=average * state_here,
        optimizer_state=state * state_here,
        gradients=gradients,
        sums=shard_sums * sums_here + local_sums,
        step_gradient=step_gradient * sums_here,
        unsharded=_unsharded(units, strategy.unshard_ahead, workers) if ways.unshards else 0.0,
        workspace=_workspace(min(RUN, longest), run_buffers, state_bytes if ways.on_disk else 0.0, workers),
        files=files,
        start=start,
    )


def _masters(trained: Iterable[UnitSize], ways: Ways, held_shards: int) -> float:
    # In fp32 the parameters are the master weights. The exception is ddp on shared memory: the parameters exist once,
    # and each worker has its own replica of the state.
    separate = ways.replicates_state and ways.shares
    return FP32 * held_shards * sum(unit.shard_numel for unit in trained if unit.itemsize < FP32 or separate)


def _workspace(run: int, run_buffers: int, new_state_bytes: float, workers: int) -> float:
    """Return the bytes of the update's buffers and of two mailboxes.

    The update needs a run's gradient, the partial sums over a run, a widened piece, and a run's new optimizer state,
    which torch creates in memory before it is moved to the allocator's buffers.
    """
    mailboxes = 2 * MAILBOX_BYTES if workers > 1 else 0
    return run * (FP32 + new_state_bytes) + FP32 * RUN * (1 + run_buffers) + mailboxes


def _params(units: Iterable[UnitSize], ways: Ways, workers: int) -> float:
    total = 0.0
    for unit in units:
        one_of_many = ways.unshards or (ways.shares and unit.trainable)
        total += unit.shard_numel * unit.itemsize * (1 if one_of_many else workers)
    return total


def _gradients(trained: Sequence[UnitSize], ways: Ways, workers: int) -> float:
    unit_bytes = [workers * unit.shard_numel * unit.itemsize for unit in trained]
    largest, in_flight = max(unit_bytes, default=0), min(len(unit_bytes), IN_FLIGHT + 1)
    if ways.retains_gradients:
        copies = 0 if ways.views or ways.reduces_every_step else in_flight * largest
        return sum(unit_bytes) + copies
    if not ways.views:
        return 2 * in_flight * largest  # sent and received
    rings = 0.0
    for itemsize in {unit.itemsize for unit in trained}:
        several = [workers * unit.shard_numel * itemsize for unit in trained if unit.itemsize == itemsize]
        rings += min(RING_SLOTS, len(several)) * max(several)
    return rings


def _unsharded(units: Sequence[UnitSize], unshard_ahead: int, workers: int) -> float:
    """Return the bytes of the units that are unsharded at a time: units in use, units unsharded ahead, and units that
    stay unsharded. Units of one size share buffers.
    """
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
    """Counts the buffers that an ordered sum owns at a time."""

    def __init__(self) -> None:
        self.current = self.peak = 0

    def own(self, value: object) -> object:
        self.current += 1
        self.peak = max(self.peak, self.current)
        return self

    def free(self, value: object) -> None:
        self.current -= value is self


def _sum_of(accumulate: int, owned: _Owned) -> OrderedSum[object]:
    return OrderedSum(accumulate, own=owned.own, add=lambda left, right: left, free=owned.free)


def _shard_sums(trained: Sequence[UnitSize], batch: Batch, ways: Ways, workers: int) -> tuple[float, int]:
    """Return the bytes of the sums over shards, and the number of RUN-sized buffers that a sum needs in the update."""
    num_bytes, run_buffers = 0.0, 0
    in_place = (
        (len(trained) if ways.retains_gradients else IN_FLIGHT) if ways.views else 0
    )  # these are the units whose pieces of the last round stay in place
    for keeps_last, units in ((True, trained[:in_place]), (False, trained[in_place:])):
        if units:
            buffers, over_a_run = _partial_sums(batch, ways, workers, keeps_last=keeps_last)
            num_bytes += FP32 * buffers * sum(unit.shard_numel for unit in units)
            run_buffers = max(run_buffers, over_a_run)
    return num_bytes, run_buffers


def _partial_sums(batch: Batch, ways: Ways, workers: int, *, keeps_last: bool) -> tuple[int, int]:
    """Return two numbers of buffers that an owner's sum needs: buffers of a shard's length, and buffers for a run of
    the update.

    keeps_last: True if the pieces of the last round stay in place until the update.
    """
    full, run = _Owned(), _Owned()
    early, late = batch.micro_batches, 0
    if keeps_last:
        late = early - (num_rounds(workers, early) - 1) * workers
        early -= late
    if ways.reduces_every_step:
        early = late = 0
    total = _sum_of(batch.accumulate, full)
    for _ in range(early):
        total.add_micro_batch(None)
    part = total.part(lambda value: None, own=run.own, add=lambda left, right: left, free=run.free)
    for _ in range(late):
        part.add_micro_batch(None)
    if ways.reduces_every_step:
        for tree in sorted(tree for trees in _subtrees(batch, workers) for tree in trees):
            part.push(None, tree.level)
    part.fold()
    # One of a run's buffers is the run's gradient, which `_workspace` counts. In fp32, fewer buffers may be enough.
    return full.peak, max(0, run.peak - 1)


def _subtrees(batch: Batch, workers: int) -> list[tuple[Subtree, ...]]:
    """Return the subtrees of each worker, if gradients are exchanged once per step."""
    runs = [run_of_virtual_workers(rank, workers, batch.virtual_workers) for rank in range(workers)]
    return [maximal_subtrees(run.start, run.stop) for run in runs]


def _local_sums(trained: Sequence[UnitSize], batch: Batch, workers: int) -> float:
    """Return the bytes of a worker's own sums of complete units and of the pieces that it receives."""
    by_worker = _subtrees(batch, workers)
    own_sums = 0
    for trees in by_worker:
        owned = _Owned()
        for tree in trees:
            local = _sum_of(batch.accumulate, owned)
            for _ in range((tree.end - tree.start) * batch.accumulate):
                local.add_micro_batch(None)
            local.fold()
        own_sums = max(own_sums, owned.peak)
    total = 0.0
    for unit in trained:
        total += own_sums * FP32 * unit.shard_numel * workers
        for slot in range(max(len(trees) for trees in by_worker)):
            received = [trees[slot] for trees in by_worker if slot < len(trees)]
            # A subtree of one micro-batch is not a sum yet, so it is sent in the parameters' dtype.
            single = batch.accumulate == 1 and all(tree.level == 0 for tree in received)
            total += len(received) * unit.shard_numel * (unit.itemsize if single else FP32)
    return total
