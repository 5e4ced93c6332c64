"""Checks a model once, and checks later that only updates change its parameters.

What a model may bring: its parameters are looked at once, when it was built, and what can't be kept is refused.

What training relies on while it goes on: the model's parameters are those that were laid out, and only updates
change them. Whatever else a model does to them would train it wrongly without a word, so it is refused by name.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import chain, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from manyhands.errors import ConfigError


def admit(model: nn.Module) -> None:
    """That the model's parameters can be moved into flat buffers without anyone noticing. Raises ConfigError.

    Trainable ones are fp32, on the CPU, and each has its memory for itself: once they are moved, whatever else was a
    view of that memory would keep the initial weights for ever. Frozen ones and buffers may be of any dtype.
    """
    for name, param in model.named_parameters():
        _admit_param(name, param)
    for name, buffer in model.named_buffers():
        if buffer.layout != torch.strided or buffer.device.type == "meta":
            raise ConfigError(
                f"buffer {name!r} can't be kept", expected="a dense tensor with values", got=_described(buffer)
            )
    if not any(param.requires_grad for param in model.parameters()):
        raise ConfigError(
            "the model has no trainable parameter",
            hint="if it makes them when it is first called, call it (or its build method) once before returning it",
        )
    _refuse_shared_memory(model)


def _admit_param(name: str, param: nn.Parameter) -> None:
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ConfigError(f"parameter {name!r} has no shape yet", hint="run the lazy module once before returning it")
    wrapped = is_traceable_wrapper_subclass(param)
    if wrapped or param.layout != torch.strided:
        raise ConfigError(
            f"parameter {name!r} is not a plain tensor",
            expected="a dense nn.Parameter (subclasses are fine) with a storage of its own",
            got=type(param).__name__ if wrapped else str(param.layout),
        )
    if param.device.type != "cpu" or (param.requires_grad and param.dtype != torch.float32):
        raise ConfigError(
            f"parameter {name!r} is not built in fp32 on the CPU",
            expected="torch.float32 on cpu (frozen parameters: any dtype)",
            got=_described(param),
            hint="leave dtype and device to the recipe's precision and device: model.float() before returning it",
        )
    if _span(param) < param.numel():
        raise ConfigError(
            f"elements of parameter {name!r} share memory",
            got=f"shape {tuple(param.shape)}, strides {param.stride()}",
            hint="keep the smaller tensor as the parameter, and expand it in forward",
        )


def _refuse_shared_memory(model: nn.Module) -> None:
    trainable = {id(param) for param in model.parameters() if param.requires_grad}
    places = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _span(tensor) * tensor.itemsize, name, tensor)
        for name, tensor in _tensors_of(model).items()
        if tensor.numel()
    )
    reached = places[:1]
    for before, place in pairwise(places):
        reached = [max(reached[0], before, key=lambda other: other[1])]
        if place[0] < reached[0][1] and {id(place[3]), id(reached[0][3])} & trainable:
            first, second = sorted((reached[0], place), key=lambda other: id(other[3]) not in trainable)
            raise ConfigError(
                f"parameter {first[2]!r} and {second[2]!r} share memory",
                got="two tensors, which would go their own ways when the parameter is moved",
                hint="use the one parameter under both names (self.b = self.a), or make the view in forward",
            )


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """By the first name each has: parameters, buffers, and plain attributes, also in lists, tuples and dicts."""
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
    """Elements between its first and its last, both included: less than it has, if some are one and the same."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}" + ("" if tensor.layout == torch.strided else f", {tensor.layout}")


_HINT = "make all parameters in recipe.model, before it returns: run the model once there, if it makes some in forward"


class ParamHolder(Protocol):
    """Where some parameters lie."""

    def not_bound(self) -> list[str]:
        """Those that somebody else gave other data."""


class ParamGuard:
    """Of a model whose parameters have found their place.

    changeable: names of frozen parameters that may change, being looked after like buffers. places: of all trainable
    parameters, and of some that are frozen.
    """

    def __init__(self, model: nn.Module, changeable: Container[str], places: Sequence[ParamHolder]) -> None:
        self._model, self._places = model, places
        self._known = dict(model.named_parameters())
        self._trainable = {name for name, param in self._known.items() if param.requires_grad}
        self._versions = {name: param._version for name, param in self._known.items() if name not in changeable}
        self._still = {  # where frozen ones are: between two rounds always there, also if they're gathered
            name: param.data_ptr()
            for name, param in self._known.items()
            if not param.requires_grad and name not in changeable
        }
        self._graph_is_known = False

    def before_step(self) -> None:
        """Raises ConfigError for a gradient that would be added to the step's."""
        for name, param in self._known.items():
            if param.grad is not None:
                raise ConfigError(
                    f"parameter {name!r} has a gradient already before the step",
                    hint="set its .grad to None after a backward of your own",
                )

    def before_backward(self, loss: Tensor) -> None:
        """Raises ConfigError if a parameter gets a gradient that the model doesn't have. Looks once."""
        if self._graph_is_known:
            return
        self._graph_is_known = True
        mine = {id(param) for param in self._known.values()}
        for leaf in _leaves(loss):
            if isinstance(leaf, nn.Parameter) and id(leaf) not in mine:
                self.after_backward()  # which knows its name, if it's in the model by now
                raise ConfigError(
                    "the loss depends on a trainable parameter that the model doesn't have: it would never be updated",
                    got=f"one of shape {tuple(leaf.shape)}",
                    hint="make its module part of the model (nn.ModuleList instead of a list, say), or freeze it",
                )

    def after_backward(self) -> None:
        """After a step's last micro-batch, before anything is updated. Raises ConfigError."""
        now = dict(self._model.named_parameters())
        for name, param in now.items():
            if name not in self._known:
                raise ConfigError(f"parameter {name!r} came after the engine was made", hint=_HINT)
            if param.requires_grad and name not in self._trainable:
                raise ConfigError(
                    f"parameter {name!r} was frozen when the engine was made, and is trainable now",
                    hint="leave it trainable in recipe.model; freezing it for some steps is fine",
                )
        for name, param in self._known.items():
            if now.get(name) is not param:
                what = f"parameter {name!r} was replaced or removed after the engine was made"
                raise ConfigError(what, hint=f"write to it in recipe.model only; {_HINT}")
        elsewhere = (name for name, place in self._still.items() if self._known[name].data_ptr() != place)
        for name in chain(*(place.not_bound() for place in self._places), elsewhere):
            raise ConfigError(
                f"parameter {name!r} was given other data after the engine was made",
                hint="leave dtype and device to the recipe: no .to(), .half() or param.data = ... afterwards",
            )
        for name, version in self._versions.items():
            if self._known[name]._version != version:
                raise ConfigError(
                    f"parameter {name!r} was changed in place, and not by the optimizer",
                    hint="load weights in recipe.model; a tensor that forward changes is a buffer;"
                    " Embedding(max_norm=...) and clamping weights after a step aren't possible",
                )


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that backward would give gradients to."""
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
