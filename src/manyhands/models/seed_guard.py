"""Refuses a model whose forward seeds the global random generators, which the engine seeds.

The engine seeds them before every micro-batch (numerics/seeds.py) and after calls of units (engine/step/call_seeds.py).
If forward seeds them with a constant, all micro-batches draw the same numbers; if forward lets the system choose the
seed, two runs differ.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from manyhands.errors import ConfigError

_SEEDS = ((torch, "seed"), (torch, "manual_seed"), (torch.random, "seed"), (torch.random, "manual_seed"))
_SEEDS_OF_OTHERS = ((random, "seed"), (np.random, "seed"))
_RESTORES = ((torch, "set_rng_state"), (torch.random, "set_rng_state"), (random, "setstate"), (np.random, "set_state"))


class _Watch(threading.local):
    """The watch of a thread. seeded: the call that seeded a generator, if its state has not been restored since."""

    active = False
    seeded: str | None = None


_watch = _Watch()
_lock = threading.Lock()
_originals: dict[tuple[Any, str], Any] = {}
_count = 0


@contextmanager
def refusing_seeds(enable: bool) -> Iterator[None]:
    """Raise ConfigError if code in this block seeds a global generator, and doesn't restore its state afterwards.

    enable: False if a compiler may trace the block, because it would trace this module's functions, too.
    """
    if not enable:
        yield
        return
    _install(1)
    _watch.active, _watch.seeded = True, None
    try:
        yield
        if _watch.seeded is not None:
            raise _refusal(_watch.seeded)
    finally:
        _watch.active = False
        _install(-1)


def _install(by: int) -> None:
    """Replace the seeding functions when a first thread starts to watch. Restore them when the last thread stops."""
    global _count
    with _lock:
        _count += by
        if _count == by == 1:
            for module, name in (*_SEEDS, *_SEEDS_OF_OTHERS, *_RESTORES):
                original = _originals[module, name] = getattr(module, name)
                watched = _watched_restore if (module, name) in _RESTORES else _watched_seed
                setattr(module, name, watched(original, f"{module.__name__}.{name}"))
        elif _count == 0:
            for (module, name), original in _originals.items():
                setattr(module, name, original)


def _watched_seed(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def seed(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if _watch.active and not caller.startswith("manyhands."):
            shown = f"{name}({', '.join(map(repr, (*args, *kwargs.values())))})"
            if all(value is None for value in (*args, *kwargs.values())):
                raise _refusal(shown)
            _watch.seeded = shown
        return original(*args, **kwargs)

    return seed


def _watched_restore(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def restore(*args: Any, **kwargs: Any) -> Any:
        _watch.seeded = None
        return original(*args, **kwargs)

    return restore


def _refusal(call: str) -> ConfigError:
    return ConfigError(
        "the model or the loss function seeds a global random generator",
        got=call,
        hint="don't seed generators: each micro-batch has its own seed. For numbers that are the same in each"
        " forward, use torch.Generator().manual_seed(...), or put the seed and the draws into a block of"
        " `with torch.random.fork_rng():`",
    )
