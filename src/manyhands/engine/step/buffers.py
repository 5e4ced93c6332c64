"""The model's buffers (running statistics, say) over a step.

Each micro-batch starts from the buffers as they were before the step. Afterwards a buffer that any micro-batch changed
becomes the mean over the micro-batches, added in index order (integers: the first micro-batch's value).

Small frozen parameters are looked after in the same way: Keras, for one, keeps running statistics in them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyhands.comm.group import Group
from manyhands.errors import ConfigError

SMALL_BUFFER_NUMEL = 1 << 16
"""Up to so many elements a frozen parameter is compared after every micro-batch, and may change."""

_HINT = "register all buffers in recipe.model, with their final shapes; what is only a cache can be a plain attribute"

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def may_change(param: nn.Parameter) -> bool:
    """Whether it's a frozen parameter that is looked after like a buffer."""
    return not param.requires_grad and param.numel() <= SMALL_BUFFER_NUMEL


class Buffers:
    """All buffers of a model. names: in the model's order, then those of small frozen parameters (`frozen`)."""

    def __init__(self, model: nn.Module, micro_batches: int) -> None:
        self._model = model
        self.frozen = {name: param for name, param in model.named_parameters() if may_change(param)}
        self._owners = {name: _owner(model, name) for name, _ in model.named_buffers()}
        self.names = [*self._owners, *self.frozen]
        self._micro_batches = micro_batches
        self._tensors: dict[str, Tensor] = {}  # the model's own objects, which others may hold, too
        self._start: dict[str, Tensor] = {}
        self._after: dict[str, dict[int, Tensor]] = {}

    def _now(self, name: str) -> Tensor:
        if name in self.frozen:
            return self.frozen[name]
        owner, attribute = self._owners[name]
        value = owner._buffers.get(attribute)
        if value is None:
            raise ConfigError(f"buffer {name!r} was removed after the engine was made", hint=_HINT)
        return value

    def named(self) -> dict[str, Tensor]:
        """All of them, as they are now; to read from and write to."""
        return {name: self._now(name).detach() for name in self.names}

    def _refuse_changes(self) -> None:
        for name, buffer in self._model.named_buffers():
            if name not in self._owners:
                raise ConfigError(f"buffer {name!r} was registered after the engine was made", hint=_HINT)
            before = self._start[name]
            if (buffer.shape, buffer.dtype) != (before.shape, before.dtype):
                raise ConfigError(
                    f"buffer {name!r} has another shape or dtype than when the step began",
                    expected=f"{before.dtype}, shape {tuple(before.shape)}",
                    got=f"{buffer.dtype}, shape {tuple(buffer.shape)}",
                    hint=_HINT,
                )

    def begin_step(self) -> None:
        """Keep the buffers as they are."""
        for name in self.names:
            now = self._tensors[name] = self._now(name)
            if name not in self._start or not _same_bits(self._start[name], now):
                self._start[name] = now.detach().clone()
        self._after = {}

    def end_micro_batch(self, micro_batch: int) -> None:
        """Take what this micro-batch made of the buffers, and put the step's back.

        Values are compared: torch doesn't count what batch norm does to its statistics as a change (`_version` stays).
        Raises ConfigError for buffers that the others couldn't know of.
        """
        self._refuse_changes()
        for name in self.names:
            now = self._now(name)
            if not _same_bits(self._start[name], now):
                if name in self.frozen and now.dtype == torch.bfloat16:
                    raise ConfigError(
                        f"frozen parameter {name!r} changes in forward, and bf16 would round its changes away",
                        hint="use precision = fp32, or make it a buffer: buffers keep their dtype",
                    )
                self._after.setdefault(name, {})[micro_batch] = now.detach().clone()
            self._put(name, self._start[name])

    def _put(self, name: str, value: Tensor) -> None:
        """Give the buffer this value, in the model's own object."""
        tensor = self._tensors[name]
        if not _same_bits(tensor, value):
            tensor.detach().copy_(value)
        if name not in self.frozen:
            owner, attribute = self._owners[name]
            owner._buffers[attribute] = tensor

    def abort(self) -> None:
        """The step failed: put its start back."""
        for name in self._start:
            self._put(name, self._start[name])

    def changed(self) -> list[bool]:
        """For each buffer whether a micro-batch of this worker changed it."""
        return [name in self._after for name in self.names]

    def merge(self, changed: list[bool], mine: list[int], group: Group, tag: str) -> None:
        """Set the step's result for the buffers that any worker changed. mine: my micro-batches. Collective."""
        names = [name for name, is_changed in zip(self.names, changed, strict=True) if is_changed]
        for name in names:
            start = self._start[name]
            values = start.new_zeros((self._micro_batches, *start.shape))
            for micro_batch in mine:
                values[micro_batch] = self._after.get(name, {}).get(micro_batch, start)
            taken = torch.zeros(self._micro_batches, dtype=torch.uint8)
            taken[mine] = 1
            who = group.all_gather_small(taken, tag)
            everyone = group.all_gather_small(values.cpu(), tag)
            owner = [
                next(rank for rank in range(group.size) if who[rank][index]) for index in range(self._micro_batches)
            ]
            result = everyone[owner[0]][0]
            if start.is_floating_point() or start.is_complex():
                for micro_batch in range(1, self._micro_batches):
                    result = result + everyone[owner[micro_batch]][micro_batch]
                result = result / self._micro_batches
            self._put(name, result.to(start))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether both are equal to the bit: a NaN is itself, 0 is not -0."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
    return value.view(_INTEGERS[value.itemsize]) if value.is_floating_point() else value


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
