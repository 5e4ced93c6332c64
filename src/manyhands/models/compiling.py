"""torch.compile for repeated blocks, deterministic; otherwise the compiler is not imported.

torch.compile for a model's repeated blocks, so that every worker computes with the same code.
By default what is compiled depends on what the process has seen before (the second shape of an input makes code for any
shape), on how long candidates took on the day, and on limits after which modules silently run as they were written. A
worker that sees other micro-batches would then have other bits. So here every shape and number gets code of its own,
nothing is measured, and too many compilations are an error.

Forwards alone are compiled, and only while a step is computed: hooks stay outside of the code, and evaluation and
samples, whose shapes change with every call, run as they are written.

torch's compiler isn't loaded by those who compile nothing.
torch's optimizers load it (torch._dynamo) when they are made, only to tell it that they are not to be compiled: 150 MiB
and one to two seconds of every worker. In its place stands a module that can do nothing but be told that. Whatever else
is wanted of it (by torch.compile, or by activation checkpointing, which reads its settings) loads the compiler, and
it's as if the stand-in had never been.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import nn

from manyhands.errors import ConfigError

MOST_COMPILATIONS = 1024
"""Of one forward, whatever the number of modules that it's the forward of."""

_TRACING = {  # torch._dynamo.config
    "automatic_dynamic_shapes": False,
    "automatic_dynamic_local_pgo": False,  # shapes that earlier runs have seen
    "automatic_dynamic_remote_pgo": False,
    "assume_static_by_default": True,
    "specialize_int": True,
    "specialize_float": True,
    "enable_compiler_collectives": False,
    "recompile_limit": MOST_COMPILATIONS,
    "accumulated_recompile_limit": MOST_COMPILATIONS,
    "fail_on_recompile_limit_hit": True,  # else it goes on with what isn't compiled
    "suppress_errors": False,
    "disable": False,
}

_CODE = {  # torch._inductor.config
    "deterministic": True,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "benchmark_kernel": False,
    "benchmark_fusion": False,
    "benchmark_epilogue_fusion": False,
    "freezing": False,
    "fallback_random": False,
    "compile_threads": 1,  # no helper processes, which would outlive a worker that is killed
}


class CompiledModules:
    """The modules of a model whose forwards are compiled while a step is computed.

    candidates: names of modules, such as the children of containers; None: nothing is to be compiled. Instead of a
    container without a forward its children are taken. torch's own layers aren't, where they stand alone: each is one
    kernel already. names: of those that are compiled. Raises ConfigError, also if there are none.
    """

    def __init__(self, model: nn.Module, candidates: Sequence[str] | None) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._own: dict[str, Any] = {}
        self._computing = False
        self._inside = 0
        if candidates is None:
            return
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise ConfigError("recipe.compile is on, but TORCHDYNAMO_DISABLE=1 is set", hint="unset it")
        for name, module in _worth_compiling(model, candidates):
            if module not in self._modules.values():  # it may be in two containers
                self._modules[name] = module
        if not self._modules:
            raise ConfigError(
                "recipe.compile finds nothing to compile in the model",
                expected="modules of several layers in an nn.ModuleList or nn.Sequential",
                got=f"{len(candidates)} of torch's own layers there" if candidates else "no such container",
                hint="put layers that belong together into a module, and such modules into an nn.ModuleList",
            )
        for name, module in self._modules.items():
            forward = module.forward
            self._own[name] = module.__dict__.get("forward")
            module.forward = partial(self._forward, torch.compile(forward, dynamic=False), forward)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the compiled modules."""
        return tuple(self._modules)

    def undo(self) -> None:
        """The modules have their own forwards again."""
        for name, module in self._modules.items():
            module.__dict__.pop("forward", None)
            if self._own[name] is not None:
                module.forward = self._own[name]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While forward and backward of a micro-batch go on."""
        if not self._modules:  # nothing of the compiler is even imported
            yield
            return
        with _settings():
            self._computing = True
            try:
                yield
            finally:
                self._computing = False

    def around(self, names: Sequence[str]) -> tuple[str, ...]:
        """For each module the compiled one that it is inside of, if it is: its hooks can't be inside, too."""
        return tuple(dict.fromkeys(self._outer(name) or name for name in names))

    def refuse_inside(self, patterns: Sequence[str], what: str) -> None:
        """Raises ConfigError for a pattern that means a part of a compiled module, if none means it as a whole."""

        def meant(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

        for name, module in self._modules.items():
            if any(map(meant, accumulate(name.split("."), "{}.{}".format))):
                continue
            for part, _ in module.named_modules(prefix=name):
                if meant(part):
                    raise ConfigError(
                        f"{what} names a module inside of one that is compiled", got=repr(part), hint=f"name {name!r}"
                    )

    def outside(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function, which may only be called outside of compiled code. What it returns raises ConfigError."""

        def checked() -> None:
            if self._inside:
                raise ConfigError(
                    "a compiled module uses a module that isn't part of it, and whose parameters are sharded",
                    expected="modules that use their own submodules only",
                    hint="use sharding zero2, or compile = false",
                )
            function()

        return checked if self._modules else function

    def _outer(self, name: str) -> str | None:
        return next((own for own in self.names if name == own or name.startswith(f"{own}.")), None)

    def _forward(self, compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._computing:
            return plain(*args, **kwargs)
        self._inside += 1
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"a forward was compiled {MOST_COMPILATIONS} times, and is wanted for one more shape or number",
                hint="pad batches to a few lengths, and keep counters of steps out of forward; or compile = false",
            ) from error
        finally:
            self._inside -= 1


def compiler_identity(wanted: bool) -> dict[str, str]:
    """What decides the bits of compiled code: the compiler, the vector instructions it uses, and its settings; nothing,
    if it isn't wanted. Raises ConfigError if there is no compiler.
    """
    if not wanted:
        return {}
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        version = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    except (InvalidCxxCompiler, OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            "recipe.compile wants a C++ compiler, and there is none that works",
            expected="g++, or the one that the environment variable CXX names",
            got=str(error).partition("\n")[0],
            hint="install one (apt install g++), or use compile = false",
        ) from None
    return {
        "compiler": version.partition("\n")[0],
        "compiler_vectors": str(pick_vec_isa()),
        "compiler_settings": _hash_of_settings(),
    }


def _worth_compiling(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    todo = [(name, model.get_submodule(name)) for name in reversed(names)]
    while todo:
        name, module = todo.pop()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            todo += [(f"{name}.{child}", inner) for child, inner in reversed(list(module.named_children()))]
        elif any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn."):
            yield name, module


@contextmanager
def _settings() -> Iterator[None]:
    import torch._inductor.config

    with torch._dynamo.config.patch(_TRACING), torch._inductor.config.patch(_CODE):
        yield


def _hash_of_settings() -> str:
    """Of all that the environment and programs may have set, as it is while a step is computed."""
    import torch._functorch.config

    with _settings():
        configs = (torch._inductor.config, torch._functorch.config)
        settings = [sorted(config.save_config_portable().items(), key=lambda item: item[0]) for config in configs]
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


COMPILER = "torch._dynamo"

_TOLD = "__dynamo_disable"  # where torch._compile remembers what the compiler made of a function


def avoid_compiler_import() -> None:
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
