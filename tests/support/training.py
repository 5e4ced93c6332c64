"""A run of the engine in one call, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import manyhands as mh
from manyhands.comm.group import Group


@dataclass(frozen=True)
class Outcome:
    """Results of a run.

    digest, weights: at its end, the digest, and that of the master weights alone. losses, norms: of every step.
    buffers: the model's, at its end.
    """

    digest: str
    weights: str
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    buffers: dict[str, Tensor]


def train_with_engine(
    recipe: mh.Recipe,
    strategy: mh.Strategy,
    *,
    steps: int,
    group: Group | None = None,
    load: Path | None = None,
    save: Path | None = None,
    save_at: int | None = None,
) -> Outcome:
    """Train until `steps` steps have been completed in total.

    load: the checkpoint to continue from. save: where to write a checkpoint, after `save_at` steps (default: at the
    end).
    """
    losses, norms = [], []
    with mh.Engine(recipe, strategy, group=group) as engine:
        if load is not None:
            engine.load(load)
        for batch in engine.batches(steps):
            metrics = engine.step(batch)
            losses.append(metrics.loss)
            norms.append(metrics.gradient_norm)
            if save is not None and engine.step_index == (save_at or steps):
                engine.save(save)
        buffers = {name: buffer.detach().clone() for name, buffer in engine.model.named_buffers()}
        full = engine.full_params()
        weights = mh.digest_of_tensors((name, full[name]) for name, _ in engine.trained)
        return Outcome(engine.digest(), weights, tuple(losses), tuple(norms), buffers)
