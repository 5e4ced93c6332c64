"""Activation checkpointing: recompute activations in backward instead of storing them.

Uses torch.utils.checkpoint without reentrant autograd (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
arXiv 1604.06174). The recomputation must give the same bits, so it starts from the same generator states and the same
buffers as the forward. After the recomputation, the buffers again have the values that the forward left in them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from manyhands.errors import ConfigError
from manyhands.numerics.seeds import generators_state, preserved_generators, restore_generators
from manyhands.options import nearest


def checkpoint_activations(
    model: nn.Module, patterns: Sequence[str], using: Callable[[str], AbstractContextManager[object]]
) -> Callable[[], None]:
    """Recompute the activations of the modules whose names match a pattern. Return a function that undoes this.

    If one matching module contains another, only the outer one is used. using: a function that takes a module's name
    and returns a context for the module's recomputation. Raises ConfigError for a pattern without a match.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(
                "strategy.activation_checkpointing matches no module", got=repr(pattern), hint=nearest(pattern, modules)
            )
    chosen: list[str] = []
    for name in modules:
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            chosen.append(name)
    # These are forwards that were set on the objects themselves, not on their classes.
    own = {name: modules[name].__dict__.get("forward") for name in chosen}
    for name in chosen:
        module = modules[name]
        # ScriptModule.__setattr__ would refuse a Python function.
        module.__dict__["forward"] = partial(_forward, module, module.forward, partial(using, name))

    def undo() -> None:
        for name in chosen:
            modules[name].__dict__.pop("forward", None)
            if own[name] is not None:
                modules[name].__dict__["forward"] = own[name]

    return undo


def _forward(
    module: nn.Module,
    forward: Callable[..., Any],
    using: Callable[[], AbstractContextManager[object]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    return checkpoint(
        _with_caches_as_before(forward, (args, kwargs)),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        # torch ends a recomputation with an exception, which the interpreter of TorchScript turns into an error.
        early_stop=not any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()),
        context_fn=lambda: _twice(module, using),
        **kwargs,
    )


def _with_caches_as_before(forward: Callable[..., Any], arguments: object) -> Callable[..., Any]:
    """Return a forward whose recomputations find the key-value caches as the first call found them.

    Models of the transformers library fill such a cache by default, even in training. A recomputed block would add its
    keys to the cache once more.
    """
    if not any(map(_is_cache, tree_leaves(arguments))):
        return forward
    before = tree_map(_copy_of_cache, arguments)
    recomputes = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal recomputes
        if recomputes:
            args, kwargs = tree_map(
                lambda arg, then: _copy_of_cache(then) if _is_cache(arg) else arg, (args, kwargs), before
            )
        recomputes = True
        return forward(*args, **kwargs)

    return run


def _is_cache(value: object) -> bool:
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def _copy_of_cache(value: Any) -> Any:
    """Return a copy of a cache that refers to the same tensors. Return other values unchanged."""
    if isinstance(value, (list, dict)):
        return tree_map(_copy_of_cache, value)
    if not _is_cache(value):
        return value
    copied = copy.copy(value)
    copied.__dict__ = {name: _copy_of_cache(attribute) for name, attribute in value.__dict__.items()}
    return copied


def _twice(
    module: nn.Module, using: Callable[[], AbstractContextManager[object]]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward and of the recomputation."""
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    generators = generators_state()

    @contextmanager
    def first() -> Iterator[None]:
        yield

    @contextmanager
    def second() -> Iterator[None]:
        after = dict(module.named_buffers())
        values = {name: buffer.detach().clone() for name, buffer in after.items()}
        _put(after, buffers)
        with preserved_generators(), using():
            restore_generators(generators)
            try:
                yield
            finally:
                _put(after, values)

    return first(), _Repeatable(second)


class _Repeatable(AbstractContextManager[None]):
    """A context that may be entered more than once, because every backward through a graph recomputes it."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *raised: Any) -> bool | None:
        return self._entered.pop().__exit__(*raised)


def _put(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        buffers[name].detach().copy_(value)
