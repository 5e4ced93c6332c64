"""Registers autograd and module hooks, and moves batches to the device.

This is the only module that registers autograd and module hooks. Each hook only calls a named method.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from manyhands.numerics.alignment import with_aligned_storage


def on_gradients(
    named_params: Iterable[tuple[str, nn.Parameter]], arrived: Callable[[str, nn.Parameter], None]
) -> list[RemovableHandle]:
    """Call `arrived(name, parameter)` in backward whenever a parameter's gradient is complete. Return the handles."""

    def register(name: str, param: nn.Parameter) -> RemovableHandle:
        def hook(_: Tensor) -> None:
            arrived(name, param)

        handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return handle

    return [register(name, param) for name, param in named_params]


def call_last(params: Iterable[nn.Parameter], hooks: Iterable[RemovableHandle]) -> None:
    """Move the hooks of `on_gradients` behind a parameter's other hooks, which may change its gradient.

    hooks: the handles, one for each parameter.
    """
    for param, hook in zip(params, hooks, strict=False):
        found = getattr(param, "_post_accumulate_grad_hooks", None)
        if found and hook.id in found and next(reversed(found)) != hook.id:
            found[hook.id] = found.pop(hook.id)  # autograd ignores move_to_end


class Removable(Protocol):
    """The handle of a hook."""

    def remove(self) -> None:
        """Remove the hook."""


def around_forward(
    module: nn.Module, before: Callable[[], None], after: Callable[[object], None]
) -> Sequence[Removable]:
    """Call `before()` before each forward of the module, and then `after(result)` with the forward's result.

    If the forward raises, `after` is called with None. Return the hooks' handles. Remove the handles of one module in
    reverse order.
    """
    if isinstance(module, torch.jit.ScriptModule):  # a ScriptModule accepts no hooks
        return [_WrappedForward(module, before, after)]

    def begin(*_: object) -> None:
        before()

    def end(_: nn.Module, args: object, result: object) -> None:
        after(result)

    return [
        module.register_forward_hook(end, always_call=True),
        module.register_forward_pre_hook(begin),
    ]


class _WrappedForward:
    """A forward that calls `before` and `after`, stored on the module itself."""

    def __init__(self, module: nn.Module, before: Callable[[], None], after: Callable[[object], None]) -> None:
        self._module, self._own = module, module.__dict__.get("forward")
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = None
            try:
                before()
                result = forward(*args, **kwargs)
                return result
            finally:
                after(result)

        module.__dict__["forward"] = wrapped  # ScriptModule.__setattr__ refuses a Python function

    def remove(self) -> None:
        """Restore the forward that the module had."""
        self._module.__dict__.pop("forward")
        if self._own is not None:
            self._module.__dict__["forward"] = self._own


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with its tensors on `device`, in aligned memory.

    batch: a tensor, an object with a method `to`, or nested tuples, lists and dicts of these.
    """
    if isinstance(batch, Tensor):
        return with_aligned_storage(batch.to(device))
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if callable(getattr(batch, "to", None)):  # for example transformers' BatchEncoding
        batch = batch.to(device)
        if isinstance(batch, UserDict):
            batch.data = to_device(batch.data, device)
    return batch


@contextmanager
def last_output(model: nn.Module) -> Iterator[list[Any]]:
    """Yield a list that has the output of the model's last call, or nothing."""
    outputs: list[Any] = []

    def keep(module: object, arguments: object, output: Any) -> None:
        outputs[:] = [output]

    handle = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
