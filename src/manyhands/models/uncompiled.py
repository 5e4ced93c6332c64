"""torch's compiler isn't loaded by those who compile nothing.

torch's optimizers load it (torch._dynamo) when they are made, only to tell it that they are not to be compiled: 150 MiB
and one to two seconds of every worker. In its place stands a module that can do nothing but be told that. Whatever else
is wanted of it (by torch.compile, or by activation checkpointing, which reads its settings) loads the compiler, and
it's as if the stand-in had never been.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"
_TOLD = "__dynamo_disable"  # where torch._compile remembers what the compiler made of a function


def keep_compiler_away() -> None:
    """Until somebody wants to compile, in this process. Does nothing if it's loaded already."""
    if COMPILER not in sys.modules:
        stand_in = _StandIn()
        sys.modules[COMPILER] = stand_in
        torch._dynamo = stand_in


class _StandIn(ModuleType):
    """What torch calls of its compiler where nothing is compiled; any other name is the compiler's own."""

    def __init__(self) -> None:
        super().__init__(COMPILER, "Stands in for the compiler.")
        self.__spec__ = importlib.util.find_spec(COMPILER)
        self.__file__ = None if self.__spec__ is None else self.__spec__.origin
        self._functions: list[Any] = []
        self._lock = threading.RLock()
        self.trace_rules = _TraceRules(self)

    def graph_break(self, msg: str = "") -> None:
        """Code before and after it is compiled apart: it isn't compiled."""

    def disable(self, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """The function, which is never to be compiled."""
        if str(getattr(fn, "__module__", "")).partition(".")[0] not in ("torch", "manyhands"):
            return self._compiler().disable(fn, *args, **kwargs)
        self._functions.append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # what modules are asked for by who looks at all of them
            raise AttributeError(name)
        return getattr(self._compiler(), name)

    def _compiler(self) -> Any:
        """The real one, from now on."""
        with self._lock:
            if sys.modules.get(COMPILER) is self:
                del sys.modules[COMPILER], torch._dynamo
                for function in self._functions:  # which it knows nothing of
                    if getattr(function, _TOLD, None) is function:
                        delattr(function, _TOLD)
                importlib.import_module(COMPILER)
        return sys.modules[COMPILER]


class _TraceRules:
    """torch._dynamo.trace_rules, of which torch.distributed clears the caches whenever it begins."""

    def __init__(self, compiler: _StandIn) -> None:
        self._compiler = compiler

    def clear_lru_cache(self) -> None:
        """There are none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(f"{self._compiler.__name__}.trace_rules"), name)
