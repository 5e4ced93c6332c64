"""Activation checkpointing: recompute activations in backward instead of keeping them.

torch.utils.checkpoint does it (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174), without
reentering autograd. So that the second time gives the bits of the first, all generators are what they were, and so are
the module's buffers, which afterwards are again what forward left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyhands.config import nearest
from manyhands.errors import ConfigError
from manyhands.numerics.seeds import generators_state, preserved_generators, restore_generators


def checkpoint_activations(
    model: nn.Module, patterns: Sequence[str], using: Callable[[str], AbstractContextManager[object]]
) -> Callable[[], None]:
    """Let the modules whose names match one of the patterns compute twice; returns what undoes it. Raises ConfigError.

    Of modules inside each other the outer one is taken. using: held while the module of that name computes again.
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
    own = {name: modules[name].__dict__.get("forward") for name in chosen}  # of the object, not of its class
    for name in chosen:
        module = modules[name]
        module.forward = partial(_forward, module, module.forward, partial(using, name))

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
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: _twice(module, using),
        **kwargs,
    )


def _twice(
    module: nn.Module, using: Callable[[], AbstractContextManager[object]]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first time and around the second."""
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

    return first(), second()


def _put(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        buffers[name].detach().copy_(value)
