"""A step's control values: what every worker must know of every micro-batch before anything is updated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from manyhands.comm.group import Group
from manyhands.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Control:
    """losses, weights: [micro_batches] fp64, by index. got_gradient: [params], changed_buffers: [buffers]: on any.
    bad: (micro-batch, index of the parameter) of the first gradient that isn't finite. stop, save: someone wants to,
    after the step."""

    losses: np.ndarray
    weights: np.ndarray
    got_gradient: np.ndarray
    changed_buffers: np.ndarray
    bad: tuple[int, int] | None
    stop: bool
    save: bool


def gather_control(mine: Control, group: Group, tag: str) -> Control:
    """Everyone's control values as one. `mine` has zeros for the micro-batches of others. Collective."""
    bad = (0, 0) if mine.bad is None else (mine.bad[0] + 1, mine.bad[1] + 1)
    floats = np.concatenate([mine.losses, mine.weights, [float(mine.stop), float(mine.save), *bad]])
    flags = np.concatenate([mine.got_gradient, mine.changed_buffers]).astype(np.uint8)
    packed = torch.from_numpy(np.concatenate([floats.view(np.uint8), flags]))
    everyone = [other.numpy() for other in group.gather(packed, tag)]
    all_floats = np.stack([array[: floats.nbytes].view(np.float64) for array in everyone])
    flags_of_any = np.max([array[floats.nbytes :] for array in everyone], axis=0).astype(bool)
    count, params = len(mine.losses), len(mine.got_gradient)
    losses, weights, wishes, bads = np.split(all_floats, [count, 2 * count, 2 * count + 2], axis=1)
    found = sorted((int(micro_batch) - 1, int(index) - 1) for micro_batch, index in bads if micro_batch > 0)
    stop, save = (bool(wish.any()) for wish in wishes.T)
    return Control(
        # Each micro-batch has one worker that computed it; the others' zeros change nothing, whatever the order.
        losses=losses.sum(axis=0),
        weights=weights.sum(axis=0),
        got_gradient=flags_of_any[:params],
        changed_buffers=flags_of_any[params:],
        bad=found[0] if found else None,
        stop=stop,
        save=save,
    )


def gather_json(group: Group, value: object, tag: str) -> list[object]:
    """Everyone's value, by rank. Collective; for setting up."""
    text = json.dumps(value).encode()
    lengths = [int(length) for length in group.gather(torch.tensor([len(text)]), tag)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = group.gather(padded, tag)
    return [json.loads(bytes(other[:length].numpy())) for other, length in zip(texts, lengths, strict=True)]


def agree(group: Group, what: str, facts: Mapping[str, str], *, hint: str) -> None:
    """That all workers have the same facts. Collective; raises the same ConfigError on all of them."""
    everyone: Sequence[dict[str, str]] = gather_json(group, dict(facts), f"start / {what} / control")  # type: ignore[assignment]
    for rank, theirs in enumerate(everyone):
        for name in [*everyone[0], *theirs]:
            first, other = everyone[0].get(name, "nothing"), theirs.get(name, "nothing")
            if first != other:
                raise ConfigError(
                    f"workers 0 and {group.workers[rank]} don't have the same {what}: they differ in {name}",
                    expected=f"{first} (worker 0)",
                    got=f"{other} (worker {group.workers[rank]})",
                    hint=hint,
                )
