"""Checks a model when it is built, and later checks that only updates change its parameters.

`admit` checks the parameters and buffers of a model after it is built, and refuses those that can't be moved into
flat buffers. `ParamGuard` checks during training that the parameters are still those that were laid out, and that only
updates change them. Any other change would silently give wrong results, so it raises an error that names the parameter.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from manyhands.errors import ConfigError
from manyhands.models.writes import Sample, changed_in_place


def admit(model: nn.Module) -> None:
    """Check that the model's parameters can be moved into flat buffers. Raises ConfigError.

    Trainable parameters must be fp32, on the CPU, and must not share memory: after a parameter has moved, another view
    of its old memory would retain the initial weights forever. Frozen parameters and buffers may have any dtype.
    """
    for name, param in model.named_parameters():
        _admit_param(name, param)
    for name, buffer in model.named_buffers():
        if buffer.layout != torch.strided or buffer.device.type == "meta":
            raise ConfigError(
                f"buffer {name!r} is not supported", expected="a dense tensor with values", got=_described(buffer)
            )
    if not any(param.requires_grad for param in model.parameters()):
        raise ConfigError(
            "the model has no trainable parameter",
            hint="if the model creates them in its first call, call it (or its build method) once before returning it",
        )
    _refuse_shared_memory(model)


def _admit_param(name: str, param: nn.Parameter) -> None:
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ConfigError(f"parameter {name!r} has no shape yet", hint="run the lazy module once before returning it")
    wrapped = is_traceable_wrapper_subclass(param)
    if wrapped or param.layout != torch.strided:
        raise ConfigError(
            f"parameter {name!r} is not a plain tensor",
            expected="a dense nn.Parameter (subclasses are fine) with its own storage",
            got=type(param).__name__ if wrapped else str(param.layout),
        )
    if param.device.type != "cpu" or (param.requires_grad and param.dtype != torch.float32):
        raise ConfigError(
            f"parameter {name!r} was not built in fp32 on the CPU",
            expected="torch.float32 on cpu (frozen parameters: any dtype)",
            got=_described(param),
            hint=_hint_for(param),
        )
    if _span(param) < param.numel():
        raise ConfigError(
            f"elements of parameter {name!r} share memory",
            got=f"shape {tuple(param.shape)}, strides {param.stride()}",
            hint="keep the smaller tensor as the parameter, and expand it in forward",
        )


def _hint_for(param: nn.Parameter) -> str:
    """Return advice for a parameter with the wrong type or on the wrong device."""
    if param.is_meta:
        return "create the model with values, outside of torch.device('meta')"
    if param.is_complex():
        return (
            "hold real and imaginary parts in one fp32 parameter, nn.Parameter(torch.view_as_real(value)), and compute"
            " with torch.view_as_complex(parameter)"
        )
    if param.device.type != "cpu":
        return "create the model on the CPU, or call model.cpu(): the recipe's device decides where it is trained"
    return "call model.float() before returning it, and make the data fp32: recipe.precision sets the precision used"


def _refuse_shared_memory(model: nn.Module) -> None:
    trainable = {id(param) for param in model.parameters() if param.requires_grad}
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _span(tensor) * tensor.itemsize, name, tensor)
        for name, tensor in _tensors_of(model).items()
        if tensor.numel()
    )
    # The spans are sorted by start, so a tensor overlaps an earlier one if it starts before the greatest end so far.
    furthest = spans[:1]
    for before, span in pairwise(spans):
        furthest = [max(furthest[0], before, key=lambda other: other[1])]
        if span[0] < furthest[0][1] and {id(span[3]), id(furthest[0][3])} & trainable:
            first, second = sorted((furthest[0], span), key=lambda other: id(other[3]) not in trainable)
            raise ConfigError(
                f"parameter {first[2]!r} and {second[2]!r} share memory",
                got="two tensors that share storage; moving the parameter would separate them",
                hint=_hint_for_sharing(model, first[2]),
            )


def _hint_for_sharing(model: nn.Module, name: str) -> str:
    """Return advice for a parameter that shares memory with another tensor."""
    hooks = model.get_submodule(name.rpartition(".")[0])._forward_pre_hooks.values()
    if any(type(hook).__name__ == "SpectralNorm" for hook in hooks):
        return "use torch.nn.utils.parametrizations.spectral_norm instead of torch.nn.utils.spectral_norm"
    return (
        "use one parameter under both names (self.b = self.a), or create the view in forward; a weight that is computed"
        " anew in each forward (weight drop) can be a parametrization: torch.nn.utils.parametrize"
    )


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters, buffers, and tensors in plain attributes, lists, tuples and dicts, each under its first
    name.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        found.setdefault(id(tensor), (name, tensor))
    for path, module in model.named_modules():
        for name, value in _attributes(module):
            if isinstance(value, Tensor) and value.layout == torch.strided and not is_traceable_wrapper_subclass(value):
                found.setdefault(id(value), (f"{path}.{name}" if path else name, value))
    return dict(found.values())


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        yield name, value
        if isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", item) for key, item in value.items())
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))


def _span(tensor: Tensor) -> int:
    """Return the number of elements of storage from the first to the last element.

    The number is less than numel if elements overlap.
    """
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}" + ("" if tensor.layout == torch.strided else f", {tensor.layout}")


WATCHED = 2
"""The number of micro-batches of each worker in which writes to parameters are detected."""

_HINT = "create all parameters in recipe.model, before it returns; if forward creates some, run the model once there"


class ParamHolder(Protocol):
    """An object that holds the data of some parameters, such as a unit."""

    def held_names(self) -> list[str]:
        """Return the names of its parameters."""

    def not_bound(self) -> list[str]:
        """Return the names of its parameters whose data other code has replaced."""


class ParamGuard:
    """Checks that only updates change a model's parameters, after they have been laid out.

    changeable: names of frozen parameters that may change, because they are managed like buffers. holders: the units,
    which hold all trainable parameters and some frozen ones.
    """

    def __init__(self, model: nn.Module, changeable: Container[str], holders: Sequence[ParamHolder]) -> None:
        self._model, self._holders = model, holders
        self._known = dict(model.named_parameters())
        self._trainable = {name for name, param in self._known.items() if param.requires_grad}
        self._versions = {name: param._version for name, param in self._known.items() if name not in changeable}
        # The addresses of the frozen parameters that no unit holds. A unit checks its own parameters, whose addresses
        # change whenever they are unsharded.
        held = {name for holder in holders for name in holder.held_names()}
        self._frozen_addresses = {
            name: param.data_ptr()
            for name, param in self._known.items()
            if not (param.requires_grad or name in changeable or name in held)
        }
        self._graph_is_known = False
        self._watched = 0  # the number of micro-batches so far
        self._steps = 0
        self._after_step: Sample | None = None

    def before_step(self) -> None:
        """Check that no parameter has a gradient, which would be added to the step's gradient. Raises ConfigError.

        Before the second step, also check that no parameter was written to since the first one.
        """
        if self._after_step is not None:
            self._after_step.refuse_writes()
            self._after_step = None
        for name, param in self._known.items():
            if param.grad is not None:
                raise ConfigError(
                    f"parameter {name!r} already has a gradient before the step",
                    hint="set its .grad to None after your own backward",
                )

    def after_step(self) -> None:
        """Prepare the check for writes between the first two steps."""
        self._steps += 1
        if self._steps == 1:
            self._after_step = self._sample()

    def after_load(self) -> None:
        """Note that new values were loaded into the parameters."""
        self._after_step = None

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Context for one micro-batch.

        At the end of each of the first micro-batches, check for writes. Raises ConfigError.
        """
        sample = self._sample() if self._watched < WATCHED else None
        yield
        self._watched += 1
        if sample is not None:
            sample.refuse_writes()

    def _sample(self) -> Sample:
        return Sample({name: param for name, param in self._known.items() if name in self._versions})

    def before_backward(self, loss: Tensor) -> None:
        """Check, once, that backward reaches only parameters of the model. Raises ConfigError."""
        if self._graph_is_known:
            return
        self._graph_is_known = True
        mine = {id(param) for param in self._known.values()}
        for leaf in _leaves(loss):
            if isinstance(leaf, nn.Parameter) and id(leaf) not in mine:
                self.after_backward()  # raises an error that names the parameter if it was added to the model meanwhile
                raise ConfigError(
                    "the loss depends on a trainable parameter that the model doesn't have, so it would never be "
                    "updated",
                    got=f"a parameter of shape {tuple(leaf.shape)}",
                    hint="make its module a part of the model (use nn.ModuleList instead of a list), or freeze the "
                    "parameter",
                )

    def after_backward(self) -> None:
        """Check all parameters, after the last micro-batch of a step and before the update. Raises ConfigError."""
        now = dict(self._model.named_parameters())
        for name, param in now.items():
            if name not in self._known:
                raise ConfigError(f"parameter {name!r} was added after the engine was created", hint=_HINT)
            if param.requires_grad and name not in self._trainable:
                raise ConfigError(
                    f"parameter {name!r} was frozen when the engine was created, but is trainable now",
                    hint="make it trainable in recipe.model; freezing it for some steps is allowed",
                )
        for name, param in self._known.items():
            if now.get(name) is not param:
                what = f"parameter {name!r} was replaced or removed after the engine was created"
                raise ConfigError(what, hint=f"write to it in recipe.model only; {_HINT}")
        addresses = self._frozen_addresses.items()
        moved = (name for name, address in addresses if self._known[name].data_ptr() != address)
        for name in chain(*(holder.not_bound() for holder in self._holders), moved):
            raise ConfigError(
                f"the data of parameter {name!r} was replaced after the engine was created",
                hint="the recipe decides dtype and device: do not call .to() or .half(), and do not assign param.data",
            )
        for name, version in self._versions.items():
            if self._known[name]._version != version:
                raise changed_in_place(name, is_frozen=name not in self._trainable)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a backward from `loss` would reach."""
    found, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(next_node for next_node, _ in node.next_functions)
    return found
