"""Recipe, Batch, Weights and Strategy, checked when they are created.

What is computed (`Recipe`, `Batch`, `Weights`) and with what (`Strategy`): frozen, keyword-only, checked when made.
A recipe fixes every bit of the result; a strategy fixes only how long it takes and how much memory it needs.

How often: every so many steps, or after so much time.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as field_of
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

PRECISIONS = ("fp32", "bf16")

DEVICES = ("cpu", "cuda")

SHARDINGS = ("ddp", "zero1", "zero2", "zero3")

OFFLOADS = ("none", "cpu", "disk")

OPTIMIZER_KINDS = ("elementwise", "per-parameter")

TRANSPORTS = ("auto", "shared-memory", "distributed", "hierarchical")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `name`, or lists them all."""
    words = list(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(words))}"


def hint_nearest(name: str, known: Iterable[str]) -> str | None:
    """`nearest`, but nothing where it would list a crowd (all of a module's names, say)."""
    hint = nearest(name, known)
    return hint if len(hint) <= 300 and hint != "known: " else None


def _choice(field: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{field} is not known",
            expected=f"one of {', '.join(known)}",
            got=repr(value),
            hint=nearest(str(value), known),
        )


def _at_least(field: str, value: object, least: float, kind: type = int) -> None:
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value < float("inf"):  # type: ignore[operator]
        noun = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{field} is out of range", expected=f"{noun} of at least {least}", got=repr(value))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How a step's global batch is cut. The cuts decide the bits of the result; the number of workers doesn't.

    `global_size` samples make one optimizer step; forward and backward see `micro_size` of them at a time.
    `virtual_workers` fixes the tree in which gradients are added (default: one virtual worker per micro-batch); each
    one adds `accumulate` micro-batches in order before the tree begins.
    """

    global_size: int
    micro_size: int
    virtual_workers: int = 0

    def __post_init__(self) -> None:
        _at_least("batch.global_size", self.global_size, 1)
        _at_least("batch.micro_size", self.micro_size, 1)
        _at_least("batch.virtual_workers", self.virtual_workers, 0)
        if self.global_size % self.micro_size:
            lower = self.global_size - self.global_size % self.micro_size
            raise ConfigError(
                "batch.global_size can't be cut into micro-batches of batch.micro_size samples",
                expected=f"a multiple of {self.micro_size}",
                got=self.global_size,
                hint=f"use global_size = {lower or self.micro_size} or {lower + self.micro_size}, or change micro_size",
            )
        if self.virtual_workers == 0:
            object.__setattr__(self, "virtual_workers", self.micro_batches)
        if self.micro_batches % self.virtual_workers:
            raise ConfigError(
                "the step's micro-batches can't be shared evenly among batch.virtual_workers",
                expected=f"a divisor of {self.micro_batches} (= {self.global_size} / {self.micro_size})",
                got=self.virtual_workers,
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one step."""
        return self.global_size // self.micro_size

    @property
    def accumulate(self) -> int:
        """Micro-batches that one virtual worker adds up before the tree of sums begins."""
        return self.micro_batches // self.virtual_workers

    def samples_of(self, step: int, micro_batch: int) -> str:
        """Which samples a micro-batch of a step holds, in words."""
        first = step * self.global_size + micro_batch * self.micro_size
        return f"samples {first} to {first + self.micro_size - 1} of the run's order"

    def check_workers(self, workers: int) -> None:
        """That each of so many workers has something to compute. Raises ConfigError."""
        if workers > self.micro_batches:
            raise ConfigError(
                f"{workers} workers are more than the step has micro-batches: some would never compute",
                expected=f"at most {self.micro_batches} workers"
                f" (= global_size / micro_size = {self.global_size} / {self.micro_size})",
                got=f"{workers} workers",
                hint="use fewer workers; or a smaller micro_size (which changes the recipe, and its bits)",
            )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Initial weights from safetensors files. Each worker reads only what it holds of them.

    path: a folder in Hugging Face's layout (model.safetensors, or several files and model.safetensors.index.json), an
        index, or one file. Names are those of the model's state_dict.
    rename: regular expressions and what they are replaced by, one after the other, in each name that the files have.
    allow_missing: patterns ("classifier.*") of names that the files may lack: they keep their built values.
    ignore: patterns of names in the files, renamed, that the model may lack.

    Raises ConfigError.
    """

    path: str | os.PathLike[str]
    rename: Mapping[str, str] = field_of(default_factory=dict)
    allow_missing: Sequence[str] = ()
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not str(self.path):
            raise ConfigError("weights.path is not a path", expected="a folder or a file", got=repr(self.path))
        object.__setattr__(self, "path", str(self.path))
        for name in ("allow_missing", "ignore"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"weights.{name} is one text", expected="a list of patterns", got=repr(self))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "rename", dict(self.rename))
        for pattern, replacement in self.rename.items():
            try:
                re.sub(pattern, replacement, "")
            except re.error as error:
                raise ConfigError(
                    f"weights.rename is not a regular expression and its replacement: {error}",
                    got=f"{pattern!r} and {replacement!r}",
                ) from None

    def may_lack(self, names: Iterable[str]) -> bool:
        """Whether the files needn't have a tensor, which the model's state_dict has under these names."""
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.allow_missing)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is computed: everything that decides the bits of the result, and nothing else.

    model: builds the model, on CPU in fp32; called once per worker with the run's seed set.
    loss: `(model, batch) -> mean` or `(model, batch) -> (sum, weight)`; a scalar tensor, and the weight (a token
        count, say) that the step's total is divided by, so that unequal micro-batches are exact.
    optimizer: gets the model's `(name, parameter)` pairs and returns a torch optimizer over them (or over groups of
        them), or a list of optimizers that share them, each parameter in one.
    optimizer_kind: of an optimizer that isn't torch's: "elementwise" (an element's update depends on that element
        alone) or "per-parameter" (it looks at a whole parameter, but at one at a time).
    weights: where the initial weights come from instead of the constructor: a path, or `Weights`. A run that goes on
        from a checkpoint has that one's.
    data: a map-style torch Dataset; `collate` (default: torch's) makes a batch of `micro_size` samples.
    schedule: makes a torch LR scheduler from the optimizer (from each, if there are several); it is stepped once after
        every optimizer step.
    clip_norm: the gradient's largest 2-norm; None: it's measured, not clipped.
    precision: "fp32", or "bf16": parameters and gradients in bfloat16, master weights, moments and sums in fp32.
    compile: let torch.compile make code of the model's repeated blocks. It changes bits, so it's here.
    threads_per_worker, device: part of the arithmetic (they change the bits of matrix products), so they're here.
    sample: shown at the end of a run, on one worker: `(model) -> str`; a generated text, say.
    name, source: the recipe's name, and where it was read from (for messages and the run directory).

    Raises ConfigError.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor | float | int]]
    optimizer: Callable[[list[tuple[str, nn.Parameter]]], Optimizer | Sequence[Optimizer]]
    data: Any
    batch: Batch
    weights: Weights | str | os.PathLike[str] | None = None
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    sample: Callable[[nn.Module], str] | None = None
    precision: str = "fp32"
    clip_norm: float | None = None
    compile: bool = False
    seed: int = 0
    threads_per_worker: int = 1
    device: str = "cpu"
    optimizer_kind: str | None = None
    name: str = "run"
    source: str | None = None

    def __post_init__(self) -> None:
        for field in ("model", "loss", "optimizer"):
            if not callable(getattr(self, field)):
                raise ConfigError(
                    f"recipe.{field} can't be called", expected="a function", got=repr(getattr(self, field))
                )
        if not isinstance(self.batch, Batch):
            raise ConfigError("recipe.batch is of another type", expected="manyhands.Batch(...)", got=repr(self.batch))
        if not hasattr(self.data, "__getitem__") or not hasattr(self.data, "__len__"):
            raise ConfigError(
                "recipe.data is not a map-style dataset",
                expected="an object with __len__ and __getitem__",
                got=type(self.data).__name__,
            )
        if isinstance(self.weights, (str, os.PathLike)):
            object.__setattr__(self, "weights", Weights(path=self.weights))
        elif not (self.weights is None or isinstance(self.weights, Weights)):
            raise ConfigError(
                "recipe.weights is of another type",
                expected="a path, or manyhands.Weights(path=...)",
                got=repr(self.weights),
            )
        _choice("recipe.precision", self.precision, PRECISIONS)
        _choice("recipe.device", self.device, DEVICES)
        if self.optimizer_kind is not None:
            _choice("recipe.optimizer_kind", self.optimizer_kind, OPTIMIZER_KINDS)
        if not isinstance(self.compile, bool):
            raise ConfigError("recipe.compile is of another type", expected="True or False", got=repr(self.compile))
        if self.compile and self.device != "cpu":
            raise ConfigError(
                "recipe.compile is for the CPU alone so far: on a GPU nothing proves that the bits stay the same",
                expected="device = cpu, or compile = false",
                got=f"device = {self.device}",
            )
        _at_least("recipe.seed", self.seed, 0)
        _at_least("recipe.threads_per_worker", self.threads_per_worker, 1)
        if self.clip_norm is not None:
            _at_least("recipe.clip_norm", self.clip_norm, 0.0, float)

    @property
    def initial_weights(self) -> Weights | None:
        """`weights` as what it was made of a path."""
        return self.weights if isinstance(self.weights, Weights) else None


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """With what a recipe is computed. It never changes a bit of the result.

    sharding: who holds which part of the state: "ddp", "zero1", "zero2" or "zero3".
    offload: where the optimizer's state and the master weights live, and at zero3 the parameters: "none" (on the
        device), "cpu" (the host's memory, for a GPU), or "disk": files in `scratch`, read ahead and written behind.
    scratch: a folder on a disk for that; "": in the run directory, or the system's for temporary files.
    transport: how bytes travel: "shared-memory" (workers on one host), "distributed" (torch.distributed: Gloo or NCCL),
        "hierarchical" (several hosts with as many CPU workers each: shared memory inside, torch.distributed between
        them), or "auto": shared memory when all workers are on one host's CPUs, else hierarchical where it fits.
    overlap: exchange a unit's gradients while backward goes on; False: after backward.
    units: names of modules whose parameters travel together; () finds them (repeated children of containers).
    activation_checkpointing: names of modules, or patterns ("blocks.*"), whose activations are computed again in
        backward instead of kept: less memory, more time.
    unshard_ahead: where parameters are sharded, how many units are gathered before they are needed.
    loader_workers: processes that read data ahead of each worker; 0 reads in the worker itself.
    stall_seconds: how long a worker may keep the others waiting before it is declared stalled.

    Raises ConfigError.
    """

    sharding: str = "zero2"
    offload: str = "none"
    scratch: str = ""
    transport: str = "auto"
    overlap: bool = True
    units: tuple[str, ...] = ()
    activation_checkpointing: tuple[str, ...] = ()
    unshard_ahead: int = 1
    loader_workers: int = 0
    stall_seconds: float = 600.0

    def __post_init__(self) -> None:
        _choice("strategy.sharding", self.sharding, SHARDINGS)
        _choice("strategy.offload", self.offload, OFFLOADS)
        _choice("strategy.transport", self.transport, TRANSPORTS)
        _at_least("strategy.loader_workers", self.loader_workers, 0)
        _at_least("strategy.unshard_ahead", self.unshard_ahead, 0)
        _at_least("strategy.stall_seconds", self.stall_seconds, 0.1, float)


_SECONDS = {"s": 1, "m": 60, "h": 3600}

_FORM = re.compile(r"(\d+)\s*(steps?|[smh])?")


@dataclass(frozen=True)
class Every:
    """`steps` or `seconds`; the other one is None."""

    steps: int | None = None
    seconds: float | None = None


def every(value: int | str) -> Every:
    """From 500, "500", "500steps", "30s", "10m" or "2h". Raises ConfigError."""
    found = _FORM.fullmatch(str(value).strip())
    if found is None or int(found[1]) < 1:
        raise ConfigError(
            "how often a checkpoint is written can't be read",
            expected="a number of steps or a time: 500, '500steps', '30s', '10m', '2h'",
            got=repr(value),
        )
    number, unit = int(found[1]), found[2]
    return Every(seconds=number * _SECONDS[unit]) if unit in _SECONDS else Every(steps=number)
