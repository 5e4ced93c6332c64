"""What a model may bring: its parameters are looked at once, when it was built, and what can't be kept is refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise

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
