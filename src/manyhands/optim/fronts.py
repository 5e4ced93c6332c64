"""The recipe's optimizers as users see them: step hooks work, but gradients and state can't be read.

A user's step hooks run once per step, around the whole update. They get the recipe's own optimizer. The sums of
gradients and the optimizer's state are divided into slices on all workers, so reading them there is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import optimizer as torchs

from manyhands.errors import ConfigError


def have_step_hooks(fronts: Sequence[torch.optim.Optimizer]) -> bool:
    """Return True if any step hook is registered, for one of the optimizers or for all optimizers of the process."""
    hooks = [torchs._global_optimizer_pre_hooks, torchs._global_optimizer_post_hooks]
    for front in fronts:
        hooks += [front._optimizer_step_pre_hooks, front._optimizer_step_post_hooks]
    return any(hooks)


def run_pre_hooks(fronts: Sequence[torch.optim.Optimizer]) -> None:
    """Call the hooks that run before a step, in torch's order. Raises ConfigError."""
    with _unreadable_gradients(fronts):
        for front in fronts:
            args, kwargs = (front,), dict[str, Any]()
            for hook in chain(torchs._global_optimizer_pre_hooks.values(), front._optimizer_step_pre_hooks.values()):
                result = hook(front, args, kwargs)
                if result is not None and result != (args, kwargs):
                    raise ConfigError(
                        "a step hook of the optimizer changes the arguments of its step",
                        got=repr(result)[:200],
                        hint="return None; an engine calls `step` without arguments",
                    )


def run_post_hooks(fronts: Sequence[torch.optim.Optimizer]) -> None:
    """Call the hooks that run after a step, in torch's order. Raises ConfigError."""
    with _unreadable_gradients(fronts):
        for front in fronts:
            for hook in chain(front._optimizer_step_post_hooks.values(), torchs._global_optimizer_post_hooks.values()):
                hook(front, (front,), {})


def note_step(front: torch.optim.Optimizer) -> None:
    """Record that `step` was called, as a schedule's wrapper around `step` does. Otherwise the schedule would warn."""
    vars(front)["_opt_called"] = True


def hide_state(front: torch.optim.Optimizer) -> None:
    """Make reading the optimizer's state an error, and free the state that its constructor made."""
    vars(front)["state"] = _UnreadableState()


@contextmanager
def _unreadable_gradients(fronts: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    params = [param for front in fronts for group in front.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.Tensor._make_wrapper_subclass(
            _UnreadableGradient, param.shape, dtype=param.dtype, device=param.device
        )
    try:
        yield
    finally:
        for param in params:
            param.grad = None


class _UnreadableGradient(Tensor):
    """A gradient without values."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            "a step hook of the optimizer uses the gradient of a parameter",
            expected="hooks that read parameters, and change hyperparameters or buffers",
            got="a gradient, whose sum lies in slices on all workers",
            hint="set clip_norm, or change gradients in the loss function, with tensor.register_hook",
        )

    __torch_dispatch__ = __torch_function__


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        "the state of the recipe's optimizer can't be used",
        got="state that lies in slices on all workers",
        hint="save it with engine.save(), which needs no state_dict() of the optimizer",
    )


class _UnreadableState(dict[Any, Any]):
    """State that can't be read or written."""

    __getitem__ = __setitem__ = __delitem__ = __contains__ = __iter__ = __len__ = _refuse
    get = keys = values = items = pop = setdefault = update = _refuse
    __reduce_ex__: Callable[..., Any] = _refuse
