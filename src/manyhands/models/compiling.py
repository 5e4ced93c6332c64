"""Deterministic torch.compile for repeated blocks. Without it, the compiler is not imported.

Compiled code must be the same in every worker. By default it depends on the shapes that the process has seen before
(the second shape of an input makes the code generic), on measured times of candidates, and on limits beyond which
modules silently run uncompiled. A worker that sees other micro-batches would then compute other bits. So this module
compiles separate code for every shape and number, measures nothing, and raises an error after too many compilations.

Only forwards are compiled, and only inside a step. Hooks stay outside of compiled code. Evaluation and samples, whose
shapes change with every call, run uncompiled.

Without `compile`, torch's compiler (torch._dynamo) is not imported. torch's optimizers import it only to mark
themselves as not compiled, which costs every worker 150 MiB and one to two seconds. A stand-in module accepts these
marks. Any other use, such as torch.compile or activation checkpointing (which reads the compiler's settings), imports
the compiler, which replaces the stand-in.
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

MAX_COMPILATIONS = 1024
"""The maximum number of compilations of one forward, counted over all modules that share it."""

_TRACING = {  # torch._dynamo.config
    "automatic_dynamic_shapes": False,
    "automatic_dynamic_local_pgo": False,  # True would use the shapes of earlier runs
    "automatic_dynamic_remote_pgo": False,
    "assume_static_by_default": True,
    "specialize_int": True,
    "specialize_float": True,
    "enable_compiler_collectives": False,
    "recompile_limit": MAX_COMPILATIONS,
    "accumulated_recompile_limit": MAX_COMPILATIONS,
    "fail_on_recompile_limit_hit": True,  # otherwise it would continue uncompiled
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
    "compile_threads": 1,  # helper processes would outlive a killed worker
}


class CompiledModules:
    """The modules of a model whose forwards are compiled, and run compiled inside a step.

    candidates: names of modules, such as the children of containers, or None to compile nothing. A container without a
    forward is replaced by its children. Single torch layers are not compiled, because each is one kernel already.
    Raises ConfigError, for example if there is nothing to compile.
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
            if module not in self._modules.values():  # a module may be in two containers
                self._modules[name] = module
        if not self._modules:
            raise ConfigError(
                "recipe.compile finds nothing to compile in the model",
                expected="modules of several layers in an nn.ModuleList or nn.Sequential",
                got=f"only torch's own layers there ({len(candidates)})" if candidates else "no such container",
                hint="put layers that belong together into a module, and such modules into an nn.ModuleList",
            )
        for name, module in self._modules.items():
            forward = module.forward
            self._own[name] = module.__dict__.get("forward")
            module.forward = partial(self._forward, torch.compile(forward, dynamic=False), forward)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the compiled modules."""
        return tuple(self._modules)

    def undo(self) -> None:
        """Restore the modules' original forward methods."""
        for name, module in self._modules.items():
            module.__dict__.pop("forward", None)
            if self._own[name] is not None:
                module.forward = self._own[name]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run compiled forwards in this block, which contains forward and backward of a micro-batch."""
        if not self._modules:  # do not import the compiler
            yield
            return
        with _settings():
            self._computing = True
            try:
                yield
            finally:
                self._computing = False

    def around(self, names: Sequence[str]) -> tuple[str, ...]:
        """Replace names of modules inside a compiled module with its name, because hooks must stay outside of compiled
        code.
        """
        return tuple(dict.fromkeys(self._outer(name) or name for name in names))

    def refuse_inside(self, patterns: Sequence[str], what: str) -> None:
        """Raise ConfigError if a pattern matches a part of a compiled module, and no pattern matches the full
        module.
        """

        def matches(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

        for name, module in self._modules.items():
            if any(map(matches, accumulate(name.split("."), "{}.{}".format))):
                continue
            for part, _ in module.named_modules(prefix=name):
                if matches(part):
                    raise ConfigError(
                        f"{what} names a module inside a compiled module", got=repr(part), hint=f"name {name!r}"
                    )

    def outside(self, function: Callable[[], None]) -> Callable[[], None]:
        """Wrap `function` so that a call from compiled code raises ConfigError."""

        def checked() -> None:
            if self._inside:
                raise ConfigError(
                    "a compiled module uses a module outside of it, whose parameters are sharded",
                    expected="modules that use only their own submodules",
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
                f"a forward was compiled {MAX_COMPILATIONS} times, and would have to be compiled for one more "
                "input shape, or one more value of a Python number",
                hint="pad batches to a few lengths, and do not use step counters in forward; or set compile = false",
            ) from error
        finally:
            self._inside -= 1


def compiler_identity(compiles: bool) -> dict[str, str]:
    """Return the facts that decide the bits of compiled code: the compiler, its vector instructions and its settings.

    The dict is empty if not `compiles`. Raises ConfigError if there is no working compiler.
    """
    if not compiles:
        return {}
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        version = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    except (InvalidCxxCompiler, OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            "recipe.compile needs a working C++ compiler, and none was found",
            expected="g++, or the one that the environment variable CXX names",
            got=str(error).partition("\n")[0],
            hint="install one (apt install g++), or set compile = false",
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
    """Return a hash of all compiler settings inside a step, including those from the environment."""
    import torch._functorch.config

    with _settings():
        configs = (torch._inductor.config, torch._functorch.config)
        settings = [sorted(config.save_config_portable().items(), key=lambda item: item[0]) for config in configs]
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


COMPILER = "torch._dynamo"

_DISABLED = "__dynamo_disable"
"""The attribute in which torch._compile caches the disabled version of a function."""


def avoid_compiler_import() -> None:
    """Install the stand-in for the compiler. Does nothing if the compiler is already imported."""
    if COMPILER not in sys.modules:
        stand_in = _StandIn()
        sys.modules[COMPILER] = stand_in
        torch._dynamo = stand_in


class _StandIn(ModuleType):
    """The functions of the compiler that torch calls without compiling. Any other name imports the compiler."""

    def __init__(self) -> None:
        super().__init__(COMPILER, "A stand-in for the compiler.")
        self.__spec__ = importlib.util.find_spec(COMPILER)
        self.__file__ = None if self.__spec__ is None else self.__spec__.origin
        self._functions: list[Any] = []
        self._lock = threading.RLock()
        self.trace_rules = _TraceRules(self)

    def graph_break(self, msg: str = "") -> None:
        """Do nothing: there is no compiled code to split."""

    def disable(self, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the function, and remember that it must not be compiled."""
        if str(getattr(fn, "__module__", "")).partition(".")[0] not in ("torch", "manyhands"):
            return self._compiler().disable(fn, *args, **kwargs)
        self._functions.append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # inspection of all modules must not import the compiler
            raise AttributeError(name)
        return getattr(self._compiler(), name)

    def _compiler(self) -> Any:
        """Import the compiler, which replaces the stand-in."""
        with self._lock:
            if sys.modules.get(COMPILER) is self:
                del sys.modules[COMPILER], torch._dynamo
                for function in self._functions:  # delete the stand-in's marks, so that the compiler makes its own
                    if getattr(function, _DISABLED, None) is function:
                        delattr(function, _DISABLED)
                importlib.import_module(COMPILER)
        return sys.modules[COMPILER]


class _TraceRules:
    """A stand-in for torch._dynamo.trace_rules, whose caches torch.distributed clears whenever it starts."""

    def __init__(self, compiler: _StandIn) -> None:
        self._compiler = compiler

    def clear_lru_cache(self) -> None:
        """Do nothing: there are no caches."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(f"{self._compiler.__name__}.trace_rules"), name)
