"""The model's buffers (such as running statistics) during a step.

Each micro-batch starts from the values that the buffers had before the step, so it doesn't matter which worker computes
it. If any micro-batch changed a buffer, `Recipe.buffers` decides the buffer's value after the step:

- mean: the mean of its values after each micro-batch, added in index order. Integers have no mean, so an integer buffer
  must have the same value after each micro-batch.
- last: its value after the step's last micro-batch.
- refuse: the change is an error.

The default is the mean. The mean is meaningful for batch norm's statistics, and exact for values that are equal after
all micro-batches. It may be meaningless for other buffers, so each of them is reported once.

Small frozen parameters are managed in the same way: Keras, for example, stores running statistics in them.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from manyhands.comm.group import Group
from manyhands.errors import ConfigError
from manyhands.numerics.digest import bits_of
from manyhands.options import hint_nearest

SMALL_BUFFER_NUMEL = 1 << 16
"""A frozen parameter with up to this many elements may change, and is compared after every micro-batch."""

_HINT = "register all buffers in recipe.model, with their final shapes; a mere cache can be a plain attribute"

_ADVICE = "Decide what it becomes after a step"

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_SHOWN = 4
"""The maximum number of buffers of a kind that a report names."""

_RUNNING = re.compile(r"(running|moving)_(mean|var|variance)|num_batches_tracked")
"""The names of batch norm's buffers in torch, timm and Keras. Their mean over micro-batches is meaningful."""


def may_change(param: nn.Parameter) -> bool:
    """Return True if this is a frozen parameter that is managed like a buffer."""
    return not param.requires_grad and param.numel() <= SMALL_BUFFER_NUMEL


class Buffers:
    """The buffers of a model, and its small frozen parameters.

    frozen: the small frozen parameters by name.
    names: the names of the buffers in the model's order, then those of `frozen`.
    persistent: the names of the buffers that the model's state_dict has.
    rules: as in `Recipe.buffers`. Raises ConfigError if a pattern matches no buffer.
    reports: True if this worker warns about buffers for which a mean may not be meaningful.
    results: for each buffer that forward has changed, a text that says how the buffer got its value, by name.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, str], *, reports: bool) -> None:
        self._model = model
        self.frozen = {name: param for name, param in model.named_parameters() if may_change(param)}
        self._owners = {name: _owner(model, name) for name, _ in model.named_buffers()}
        self.names = [*self._owners, *self.frozen]
        self.persistent = [
            name for name, (owner, key) in self._owners.items() if key not in owner._non_persistent_buffers_set
        ]
        self._rules = {name: _rule_of(name, rules) for name in self.names}
        for pattern in rules:
            if not any(fnmatchcase(name, pattern) for name in self.names):
                raise ConfigError(
                    f"recipe.buffers: {pattern!r} matches no buffer of the model",
                    expected=f"a pattern for names like {', '.join(self.names[:3])}" if self.names else None,
                    hint=hint_nearest(pattern.strip("*."), self.names),
                )
        self.results: dict[str, str] = {}
        self._reports = reports
        self._tensors: dict[str, Tensor] = {}  # the model's own tensor objects; other objects may refer to them
        self._start: dict[str, Tensor] = {}  # copies of the values before the step
        self._addresses: dict[str, int] = {}  # of tensors in plain memory, inside `preserved`
        self._changed_between_steps: set[str] = set()
        self._after: dict[str, dict[int, Tensor]] = {}  # changed values, by name and micro-batch

    @property
    def rules_of_bits(self) -> dict[str, str]:
        """Return, by buffer, the rules whose result differs from the default's.

        "mean" is the default, and "refuse" raises an error but changes no bit. A run can resume after its user has set
        or removed such rules.
        """
        return {name: rule for name, rule in self._rules.items() if rule == "last"}

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

    def _refuse_other_buffers(self) -> None:
        """Raise ConfigError if buffers were added, or have a different shape or dtype than at the step's start."""
        for name, buffer in self._model.named_buffers():
            if name not in self._owners:
                raise ConfigError(f"buffer {name!r} was registered after the engine was created", hint=_HINT)
            before = self._start[name]
            if (buffer.shape, buffer.dtype) != (before.shape, before.dtype):
                raise ConfigError(
                    f"buffer {name!r} has a different shape or dtype than at the start of the step",
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

    def end_micro_batch(self, micro_batch: int, *, refuse_nan: bool = False) -> None:
        """Copy the values that this micro-batch changed, and restore the values from before the step.

        refuse_nan: True if the model reads NaN from parameters that are sharded at the time.
        Raises ConfigError if a buffer was added or removed, or has a new shape or dtype, because peers don't know about
        it. With `refuse_nan`, also raises ConfigError if a buffer has become NaN.
        """
        self._refuse_other_buffers()
        for name in self.names:
            current = self._current(name)
            # Compare values, because batch norm's updates of its statistics don't increase torch's `_version`.
            if not _same_bits(self._start[name], current):
                if name in self.frozen and current.dtype == torch.bfloat16:
                    raise ConfigError(
                        f"frozen parameter {name!r} changes in forward, and bf16 would round its changes away",
                        hint="use precision = fp32, or make it a buffer: buffers retain their dtype",
                    )
                _refuse_overlap(name, self._tensors[name])
                if refuse_nan:
                    what = f"{'frozen parameter' if name in self.frozen else 'buffer'} {name!r}"
                    _refuse_new_nan(what, self._start[name], current)
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
        for name, start in self._start.items():
            tensor = self._tensors[name]
            # An evaluation comes here after each micro-batch, and a model may have hundreds of small buffers. So look
            # at the same memory first, without checking what kind of tensor it is.
            address = self._addresses.get(name)
            if address is None or tensor.data_ptr() != address or _memcmp(address, start.data_ptr(), start.nbytes):
                self._put(name, start)
            elif name not in self.frozen:
                owner, attribute = self._owners[name]
                owner._buffers[attribute] = tensor

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Return a context, for use between two steps, that restores all values at its end.

        Raises ConfigError in the same cases as `end_micro_batch`.
        """
        self.begin_step()
        both = ((name, self._tensors[name], start) for name, start in self._start.items())
        self._addresses = {name: now.data_ptr() for name, now, start in both if _is_plain(now) and _is_plain(start)}
        try:
            yield
            self._refuse_other_buffers()
        finally:
            self.abort()
            self._addresses = {}

    def changed(self) -> list[bool]:
        """Return for each of `names` whether a micro-batch of this worker changed it."""
        return [name in self._after for name in self.names]

    def merge(self, changed: list[bool], present: range, mine: list[int], group: Group, tag: str) -> None:
        """Set the buffers that any worker changed to the step's result. Collective.

        changed: for each of `names`, True if any worker changed it; the same on all workers.
        present: the indices of the step's micro-batches. mine: this worker's.
        """
        self._changed_between_steps.clear()
        names = [name for name, is_changed in zip(self.names, changed, strict=True) if is_changed]
        for name in names:
            start, is_last = self._start[name], self._rules[name] == "last"
            wanted = list(present[-1:] if is_last else present)
            values = start.new_zeros((len(wanted), *start.shape))
            computed = torch.zeros(len(wanted), dtype=torch.uint8)
            for index, micro_batch in enumerate(wanted):
                if micro_batch in mine:
                    values[index] = self._after.get(name, {}).get(micro_batch, start)
                    computed[index] = 1
            computed_by = torch.stack(group.all_gather_small(computed, tag))
            all_values = group.all_gather_small(values.cpu(), tag)
            owners = computed_by.argmax(0).tolist()
            self._start[name] = self._result(name, [all_values[rank][i] for i, rank in enumerate(owners)]).to(start)
            self._put(name, self._start[name])

    def merged(self, name: str, values: list[Tensor]) -> Tensor:
        """Return the result of a buffer's values on all islands after a round, in the order of the islands.

        The rule for micro-batches applies.
        """
        used = values[-1:] if self._rules[name] == "last" else values
        return self._result(name, used).to(values[0].dtype).clone()

    def _result(self, name: str, values: list[Tensor]) -> Tensor:
        """Return the step's result from the buffer's values after the micro-batches that its rule uses, in index
        order.
        """
        agree = all(_same_bits(value, values[0]) for value in values)
        is_integer = not (values[0].is_floating_point() or values[0].is_complex())
        has_mean = not is_integer and values[0].itemsize > 1  # torch doesn't add 8-bit floats
        if self._rules[name] == "last":
            self.results[name] = "last micro-batch"
        elif agree:
            self.results.setdefault(name, "equal after all micro-batches")
        elif not has_mean:
            kind = "integers" if is_integer else "8-bit floats"
            raise ConfigError(
                f"buffer {name!r} has {kind} that differ between the micro-batches of a step",
                expected="the same value after each micro-batch, or a rule",
                hint=f"{_ADVICE}: set buffers={{{name!r}: 'last'}} in the recipe, or make it a buffer of floating-point"
                " numbers of at least 16 bits, which have a mean",
            )
        elif self._rules[name] is None and not _RUNNING.fullmatch(re.split("[./]", name)[-1]):
            self._warn(name)
        if agree:
            return values[0]
        self.results[name] = "mean over the micro-batches"
        # Add in index order, whichever workers computed the micro-batches: addition isn't associative.
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total / len(values)

    def _warn(self, name: str) -> None:
        """Report once that the mean may not be meaningful for a buffer."""
        if self._reports and not self.results.get(name, "").startswith("mean"):
            warnings.warn(
                f"buffer {name!r} differs between the micro-batches of a step, and becomes their mean. {_ADVICE}: "
                f"set buffers={{{name!r}: 'mean'}} in the recipe, or 'last' or 'refuse'",
                stacklevel=2,
            )

    def refuse_changes(self, changed: list[bool]) -> None:
        """Raise ConfigError for a changed buffer whose rule is to refuse changes. changed: as in `merge`."""
        for name, is_changed in zip(self.names, changed, strict=True):
            if is_changed and self._rules[name] == "refuse":
                raise ConfigError(
                    f"buffer {name!r} was changed in forward, which recipe.buffers refuses",
                    hint="keep it constant, or choose 'mean' or 'last' for it in recipe.buffers",
                )

    def report(self) -> str | None:
        """Return one line about the buffers that forward has changed, or None if there are none."""
        names: dict[str, list[str]] = {}
        for name, result in self.results.items():
            names.setdefault(result, []).append(name)
        parts = [
            f"{', '.join(found[:_SHOWN])}{f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''} ({result})"
            for result, found in names.items()
        ]
        return f"buffers that forward changes: {'; '.join(parts)}" if parts else None


def _rule_of(name: str, rules: Mapping[str, str]) -> str | None:
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def names_in_order(model: nn.Module) -> list[str]:
    """Return the names of all parameters and buffers in the order of the model's state_dict, each tensor once."""
    found: dict[int, str] = {}
    for prefix, module in model.named_modules():
        own = (*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False))
        for name, tensor in own:
            found.setdefault(id(tensor), name)
    return list(found.values())


def _refuse_new_nan(what: str, before: Tensor, now: Tensor) -> None:
    if bool((now.detach().isnan() & ~before.isnan()).any()):
        raise ConfigError(
            f"{what} became NaN in forward",
            expected="a forward that uses sharded parameters in their own modules only; elsewhere they read as NaN",
            hint="update averages of weights (EMA) in a step hook of the optimizer, see docs/models.md, or use sharding"
            " zero2",
        )


def _refuse_overlap(name: str, buffer: Tensor) -> None:
    if any(length > 1 and stride == 0 for length, stride in zip(buffer.shape, buffer.stride(), strict=True)):
        raise ConfigError(
            f"buffer {name!r} changes in forward, and its elements share memory",
            got=f"shape {tuple(buffer.shape)}, strides {buffer.stride()}",
            hint="register a copy without expanded dimensions: tensor.clone(memory_format=torch.contiguous_format)",
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Return True if the tensors are equal bit for bit: a NaN equals itself, and 0 does not equal -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if _is_plain(one) and _is_plain(other):
        # Most buffers are small, and torch.equal takes ten times as long for them.
        return not _memcmp(one.data_ptr(), other.data_ptr(), one.nbytes)
    return torch.equal(bits_of(one), bits_of(other))


def _is_plain(tensor: Tensor) -> bool:
    """Return True if the bytes at the tensor's address are its values."""
    is_dense = tensor.is_cpu and tensor.layout is torch.strided and tensor.is_contiguous()
    return is_dense and not (tensor.is_neg() or tensor.is_conj() or tensor.is_quantized)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has the buffer, and the buffer's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
