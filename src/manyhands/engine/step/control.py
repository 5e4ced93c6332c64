"""Values that every worker must know before the update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from manyhands.comm.group import Group


@dataclass(frozen=True, kw_only=True)
class Control:
    """The control values of a step, of one worker or combined over all workers.

    losses, weights: [micro_batches] fp64, by index.
    metrics: [2 * metrics, micro_batches] fp64: the sums and weights of each metric; see `LossReader.values`.
    got_gradient: [params], True if any micro-batch gave the parameter a gradient.
    changed_buffers: [buffers], True if any micro-batch changed the buffer.
    bad: (micro-batch, index of the parameter) of the first gradient that is not finite.
    settings: the hashes of the workers' settings (see `Settings`), by rank. The values of one worker have only its
    hash.
    stop, save: True if any worker requests to stop or to save after the step.
    has_hooks: True if any worker has a step hook for an optimizer.
    sets_attributes: True if forward has set an attribute for the first time on any worker.
    measured: [workers, figures] fp64: what each worker measured in the previous step, see `PhaseClock`. The values of
    one worker have only its row.
    """

    losses: np.ndarray
    weights: np.ndarray
    metrics: np.ndarray
    got_gradient: np.ndarray
    changed_buffers: np.ndarray
    bad: tuple[int, int] | None
    settings: tuple[int, ...]
    stop: bool
    save: bool
    has_hooks: bool
    sets_attributes: bool
    measured: np.ndarray


def all_gather_control(mine: Control, group: Group, tag: str) -> Control:
    """Combine all workers' control values. `mine` has zeros for other workers' micro-batches. Collective."""
    # One message holds everything, because each small message adds latency: first fp64 values, then flags as bytes.
    # Add 1 to the indices, so that (0, 0) means "no bad gradient".
    bad = (0, 0) if mine.bad is None else (mine.bad[0] + 1, mine.bad[1] + 1)
    values = np.concatenate([mine.losses[None], mine.weights[None], mine.metrics])
    requests = [float(each) for each in (mine.stop, mine.save, mine.has_hooks, mine.sets_attributes)]
    floats = np.concatenate([values.ravel(), requests, bad, mine.measured.ravel()])
    flags = np.concatenate([mine.got_gradient, mine.changed_buffers]).astype(np.uint8)
    settings = np.array(mine.settings, dtype=np.int64)
    packed = torch.from_numpy(np.concatenate([floats.view(np.uint8), settings.view(np.uint8), flags]))
    arrays = [other.numpy() for other in group.all_gather_small(packed, tag)]
    all_floats = np.stack([array[: floats.nbytes].view(np.float64) for array in arrays])
    end = floats.nbytes + settings.nbytes
    hashes = [int(array[floats.nbytes : end].view(np.int64)[0]) for array in arrays]
    flags_of_any = np.max([array[end:] for array in arrays], axis=0).astype(bool)
    params = len(mine.got_gradient)
    ends = np.cumsum([values.size, len(requests), len(bad)])
    all_values, all_requests, bads, measured = np.split(all_floats, ends, axis=1)
    # Exactly one worker computed each micro-batch. The other workers contribute zeros, so the order of addition doesn't
    # matter.
    losses, weights, *metrics = all_values.sum(axis=0).reshape(values.shape)
    found = sorted((int(micro_batch) - 1, int(index) - 1) for micro_batch, index in bads if micro_batch > 0)
    stop, save, has_hooks, sets_attributes = (bool(request.any()) for request in all_requests.T)
    return Control(
        losses=losses,
        weights=weights,
        metrics=np.array(metrics).reshape(mine.metrics.shape),
        got_gradient=flags_of_any[:params],
        changed_buffers=flags_of_any[params:],
        bad=found[0] if found else None,
        settings=tuple(hashes),
        stop=stop,
        save=save,
        has_hooks=has_hooks,
        sets_attributes=sets_attributes,
        measured=measured,
    )


def added_in_order(values: np.ndarray) -> float:
    """Return the sum, added from left to right. numpy adds pairwise, in an order that depends on the length."""
    total = 0.0
    for value in values:
        total += float(value)
    return total
