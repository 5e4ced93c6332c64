"""The model's buffers (such as running statistics) during a step.

Each micro-batch starts from the values that the buffers had before the step, so it doesn't matter which worker computes
it. If any micro-batch changed a buffer, the step sets the buffer to the mean of its values after each micro-batch. The
values are added in index order. An integer buffer is set to its value after the first micro-batch.

Small frozen parameters are managed in the same way: Keras, for example, stores running statistics in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from manyhands.comm.group import Group
from manyhands.errors import ConfigError

SMALL_BUFFER_NUMEL = 1 << 16
"""A frozen parameter with up to this many elements may change, and is compared after every micro-batch."""

_HINT = "register all buffers in recipe.model, with their final shapes; a mere cache can be a plain attribute"

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def may_change(param: nn.Parameter) -> bool:
    """Return True if this is a frozen parameter that is managed like a buffer."""
    return not param.requires_grad and param.numel() <= SMALL_BUFFER_NUMEL


class Buffers:
    """The buffers of a model, and its small frozen parameters.

    frozen: the small frozen parameters by name.
    names: the names of the buffers in the model's order, then those of `frozen`.
    persistent: the names of the buffers that the model's state_dict has.
    """

    def __init__(self, model: nn.Module, micro_batches: int) -> None:
        self._model = model
        self.frozen = {name: param for name, param in model.named_parameters() if may_change(param)}
        self._owners = {name: _owner(model, name) for name, _ in model.named_buffers()}
        self.names = [*self._owners, *self.frozen]
        self.persistent = [
            name for name, (owner, key) in self._owners.items() if key not in owner._non_persistent_buffers_set
        ]
        self._micro_batches = micro_batches
        self._tensors: dict[str, Tensor] = {}  # the model's own tensor objects; other objects may refer to them
        self._start: dict[str, Tensor] = {}  # copies of the values before the step
        self._changed_between_steps: set[str] = set()
        self._after: dict[str, dict[int, Tensor]] = {}  # changed values, by name and micro-batch

    def _current(self, name: str) -> Tensor:
        """Return the buffer's current tensor. Raises ConfigError if the model has removed it."""
        if name in self.frozen:
            return self.frozen[name]
        owner, attribute = self._owners[name]
        value = owner._buffers.get(attribute)
        if value is None:
            raise ConfigError(f"buffer {name!r} was removed after the engine was created", hint=_HINT)
        return value

    def named(self) -> dict[str, Tensor]:
        """Return all current tensors by name. The caller may read and write them."""
        return {name: self._current(name).detach() for name in self.names}

    def _refuse_changes(self) -> None:
        """Raise ConfigError if buffers were added, or have a different shape or dtype than at the step's start."""
        for name, buffer in self._model.named_buffers():
            if name not in self._owners:
                raise ConfigError(f"buffer {name!r} was registered after the engine was created", hint=_HINT)
            before = self._start[name]
            if (buffer.shape, buffer.dtype) != (before.shape, before.dtype):
                raise ConfigError(
                    f"buffer {name!r} has another shape or dtype than at the start of the step",
                    expected=f"{before.dtype}, shape {tuple(before.shape)}",
                    got=f"{buffer.dtype}, shape {tuple(buffer.shape)}",
                    hint=_HINT,
                )

    def begin_step(self) -> None:
        """Copy the buffers' values, from which every micro-batch will start."""
        for name in self.names:
            current = self._tensors[name] = self._current(name)
            if name not in self._start or not _same_bits(self._start[name], current):
                if name in self._start:
                    self._changed_between_steps.add(name)
                self._start[name] = current.detach().clone()
        self._after = {}

    def changed_between_steps(self) -> dict[str, Tensor]:
        """Return the buffers that other code has changed since the end of the last step, by name."""
        return {name: self._tensors[name].detach() for name in sorted(self._changed_between_steps)}

    def end_micro_batch(self, micro_batch: int) -> None:
        """Copy the values that this micro-batch changed, and restore those from before the step.

        Raises ConfigError if a buffer was added or removed, or has a new shape or dtype, because peers don't know about
        it.
        """
        self._refuse_changes()
        for name in self.names:
            current = self._current(name)
            # Compare values, because batch norm's updates of its statistics don't increase torch's `_version`.
            if not _same_bits(self._start[name], current):
                if name in self.frozen and current.dtype == torch.bfloat16:
                    raise ConfigError(
                        f"frozen parameter {name!r} changes in forward, and bf16 would round its changes away",
                        hint="use precision = fp32, or make it a buffer: buffers retain their dtype",
                    )
                self._after.setdefault(name, {})[micro_batch] = current.detach().clone()
            self._put(name, self._start[name])

    def _put(self, name: str, value: Tensor) -> None:
        """Set the buffer's value, in the model's own tensor object."""
        tensor = self._tensors[name]
        if not _same_bits(tensor, value):
            tensor.detach().copy_(value)
        if name not in self.frozen:
            owner, attribute = self._owners[name]
            owner._buffers[attribute] = tensor

    def abort(self) -> None:
        """Restore the values that `begin_step` has copied."""
        for name in self._start:
            self._put(name, self._start[name])

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Return a context, for use between two steps, that restores all values at its end.

        Raises ConfigError in the same cases as `end_micro_batch`.
        """
        self.begin_step()
        try:
            yield
            self._refuse_changes()
        finally:
            self.abort()

    def changed(self) -> list[bool]:
        """Return for each of `names` whether a micro-batch of this worker changed it."""
        return [name in self._after for name in self.names]

    def merge(self, changed: list[bool], mine: list[int], group: Group, tag: str) -> None:
        """Set the buffers that any worker changed to the step's result. Collective.

        changed: for each of `names`, True if any worker changed it; the same on all workers.
        mine: the indices of this worker's micro-batches.
        """
        self._changed_between_steps.clear()
        names = [name for name, is_changed in zip(self.names, changed, strict=True) if is_changed]
        for name in names:
            start = self._start[name]
            values = start.new_zeros((self._micro_batches, *start.shape))
            for micro_batch in mine:
                values[micro_batch] = self._after.get(name, {}).get(micro_batch, start)
            computed = torch.zeros(self._micro_batches, dtype=torch.uint8)
            computed[mine] = 1
            computed_by = group.all_gather_small(computed, tag)
            all_values = group.all_gather_small(values.cpu(), tag)
            owner = [
                next(rank for rank in range(group.size) if computed_by[rank][index])
                for index in range(self._micro_batches)
            ]
            # Add in index order, whichever workers computed the micro-batches: addition isn't associative.
            result = all_values[owner[0]][0]
            if start.is_floating_point() or start.is_complex():
                for micro_batch in range(1, self._micro_batches):
                    result = result + all_values[owner[micro_batch]][micro_batch]
                result = result / self._micro_batches
            self._start[name] = result.to(start)
            self._put(name, self._start[name])


def names_in_order(model: nn.Module) -> list[str]:
    """Return the names of all parameters and buffers in the order of the model's state_dict, each tensor once."""
    found: dict[int, str] = {}
    for prefix, module in model.named_modules():
        own = (*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False))
        for name, tensor in own:
            found.setdefault(id(tensor), name)
    return list(found.values())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Return True if the tensors are equal bit for bit: a NaN equals itself, and 0 does not equal -0."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    """Return a view of floating-point values as integers of the same size. Return other values unchanged."""
    value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
    return value.view(_INTEGERS[value.itemsize]) if value.is_floating_point() else value


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has the buffer, and the buffer's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
