"""Settings that code outside of the engine may change between steps. All workers must have the same settings.

A hash of the settings is sent with a step's control values, so the comparison needs no additional message. If the
hashes differ, the workers exchange the settings, so that the error can name the setting that differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from manyhands.comm.agreement import agree
from manyhands.comm.group import Group
from manyhands.engine.agreement import buffer_facts
from manyhands.engine.step.buffers import Buffers
from manyhands.errors import ConfigError, InvariantError
from manyhands.optim.sliced import SlicedOptimizer

_HINT = (
    "make the same changes between steps on all workers, never under `if rank == 0`. A time, or a loss that one worker"
    " measured, differs between workers: decide by the figures of the step, which are the same on all workers"
)


class Settings:
    """The settings at the start of a step.

    They are the optimizers' param groups, the `requires_grad` of parameters, buffers that were changed since the last
    step, and torch's global modes.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], optimizer: SlicedOptimizer, buffers: Buffers) -> None:
        self._params, self._optimizer, self._buffers = params, optimizer, buffers
        self._groups: list[dict[str, Any]] = []
        self._trained: list[bool] = []
        self._changed: dict[str, str] = {}
        self._modes: dict[str, str] = {}
        self._by_forward: dict[str, bool] | None = None  # `requires_grad` that forward has changed in this step
        self._previous: dict[str, bool] = {}

    def begin_step(self) -> None:
        """Read the settings, after `Buffers.begin_step`."""
        self._groups = self._optimizer.hyperparameters()
        self._trained = [param.requires_grad for param in self._params.values()]
        # A worker may compute no micro-batch in an epoch's last step. Then the changes of the step before are compared.
        self._previous, self._by_forward = self._by_forward or self._previous, None
        self._changed = buffer_facts(self._buffers.changed_between_steps())
        self._modes = {
            "torch.get_default_dtype()": str(torch.get_default_dtype()),
            "torch.is_autocast_enabled('cuda')": str(torch.is_autocast_enabled("cuda")),
            "torch.is_autocast_enabled('cpu')": str(torch.is_autocast_enabled("cpu")),
            "torch.is_grad_enabled()": str(torch.is_grad_enabled()),
        }

    def end_micro_batch(self) -> None:
        """Set `requires_grad` back, so that the next micro-batch starts with the values at the start of the step.

        Raises ConfigError if forward has changed it differently than in the step's previous micro-batch.
        """
        pairs = zip(self._params.items(), self._trained, strict=True)
        changed = {name: param.requires_grad for (name, param), before in pairs if param.requires_grad != before}
        for name, is_trained in changed.items():
            self._params[name].requires_grad_(not is_trained)
        if self._by_forward is None:
            self._by_forward = changed
        for different, _ in sorted(changed.items() ^ self._by_forward.items()):
            raise ConfigError(
                f"forward changed requires_grad of parameter {different!r} in some micro-batches of a step only",
                expected="the same change in each micro-batch of a step",
                hint="to leave a parameter out for some samples, use param.detach() or torch.no_grad() in forward; to"
                " freeze it from some step on, change requires_grad between steps",
            )

    @property
    def _forward_changes(self) -> dict[str, bool]:
        return self._previous if self._by_forward is None else self._by_forward

    @property
    def hash(self) -> int:
        """Return 64 bits that are the same on all workers with the same settings."""
        text = repr((self._groups, bytes(self._trained), self._forward_changes, self._changed, self._modes))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)

    def compare(self, hashes: Sequence[int], group: Group) -> None:
        """Check that all workers have the same settings. hashes: the workers' hashes, by rank. Collective if they
        differ.

        Raises the same ConfigError on all workers. The error names the setting that differs.
        """
        if len(set(hashes)) == 1:
            return
        facts = {
            f"optimizer group {index}.{key}": repr(value)
            for index, hyper in enumerate(self._groups)
            for key, value in hyper.items()
        }
        trained = zip(self._params, self._trained, strict=True)
        facts |= {f"{name}.requires_grad": str(is_trained) for name, is_trained in trained}
        facts |= {f"{name}.requires_grad, by forward": str(value) for name, value in self._forward_changes.items()}
        agree(group, "settings", facts | self._changed | self._modes, hint=_HINT)
        raise InvariantError("workers have the same settings, but not the same hash of them")
