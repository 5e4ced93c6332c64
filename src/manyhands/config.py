"""Recipe, Batch and Strategy, checked when they are created.

`Recipe` and `Batch` define the computation, and `Strategy` defines the resources. A recipe decides every bit of the
result. A strategy decides only time and memory. All these classes are frozen and keyword-only.

Recipe files and the command line take the options from these classes: to add an option, add a field (see `options.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from manyhands.average import Average, check_average
from manyhands.errors import ConfigError
from manyhands.given_objects import FUNCTIONS, check_function
from manyhands.intervals import index_of_step
from manyhands.islands import Islands
from manyhands.options import check_options, option, options
from manyhands.streams import Stream, refuse_indexed, stream_of
from manyhands.validation import TRAINED, Validation
from manyhands.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

PRECISIONS = ("fp32", "bf16")
DEVICES = ("cpu", "cuda")
SHARDINGS = ("ddp", "zero1", "zero2", "zero3")

OFFLOADS = ("none", "cpu", "disk")

OPTIMIZER_KINDS = ("elementwise", "per-parameter")

ATTRIBUTE_RULES = ("restore", "keep")

BUFFER_RULES = ("mean", "last", "refuse")

EPOCH_ENDS = ("join", "short", "drop")

ORDERS = ("random", "sequential")

TRANSPORTS = ("auto", "shared-memory", "distributed", "hierarchical")


@options
class Batch:
    """The division of one step's samples into micro-batches. It decides the bits; the number of workers does not.

    Each virtual worker adds the gradients of `accumulate` micro-batches in order. Then a binary tree adds the sums of
    the virtual workers. Raises ConfigError.
    """

    global_size: int = option(at_least=1, help="Samples in one optimizer step.")
    micro_size: int = option(at_least=1, help="Samples in one micro-batch: forward and backward process them together.")
    virtual_workers: int = option(
        default=0,
        at_least=0,
        help="Leaves of the tree that adds gradients. 0: one for each micro-batch.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.global_size % self.micro_size:
            upper = self.global_size - self.global_size % self.micro_size + self.micro_size
            sizes = f"{upper - self.micro_size} or {upper}" if self.global_size > self.micro_size else str(upper)
            raise ConfigError(
                "batch.global_size can't be divided into micro-batches of batch.micro_size samples",
                expected=f"a multiple of {self.micro_size}",
                got=self.global_size,
                hint=f"use global_size = {sizes}, or change micro_size",
            )
        if self.virtual_workers == 0:
            object.__setattr__(self, "virtual_workers", self.micro_batches)
        if self.micro_batches % self.virtual_workers:
            raise ConfigError(
                "the step's micro-batches can't be divided evenly among batch.virtual_workers",
                expected=f"a divisor of {self.micro_batches} (= {self.global_size} / {self.micro_size})",
                got=self.virtual_workers,
            )

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches in one step."""
        return self.global_size // self.micro_size

    @property
    def accumulate(self) -> int:
        """Return the number of micro-batches that a virtual worker adds in order, before the tree adds the sums."""
        return self.micro_batches // self.virtual_workers

    def samples_of(self, step: int, micro_batch: int) -> str:
        """Return a description of a micro-batch's samples, for error messages. step: counted from 1."""
        first = index_of_step(step) * self.global_size + micro_batch * self.micro_size
        return f"samples {first} to {first + self.micro_size - 1} in the run's order"

    def check_workers(self, workers: int) -> None:
        """Check that there is a micro-batch for each of the `workers` workers. Raises ConfigError."""
        if workers > self.micro_batches:
            raise ConfigError(
                f"{workers} workers are too many for a step of {self.micro_batches} micro-batches: "
                "some workers would never compute",
                expected=f"at most {self.micro_batches} workers"
                f" (= global_size / micro_size = {self.global_size} / {self.micro_size})",
                got=f"{workers} workers",
                hint="use fewer workers, or a smaller micro_size (which changes the recipe and its bits)",
            )


@options
class Recipe:
    """Everything that decides the bits of the result, and nothing else. Raises ConfigError."""

    model: Callable[[], nn.Module] = option(
        in_toml=False,
        help="Builds the model on the CPU in fp32. It is called once in each worker, with the run's seed set.",
    )
    loss: Callable[[nn.Module, Any], Tensor | tuple[Any, Any]] = option(
        in_toml=False,
        help="(model, batch) -> mean, or (model, batch) -> (sum, weight). The mean or sum is a scalar tensor; the "
        "weight is the number of tokens, for example. The sum over the step is divided by the step's total weight, so "
        "the mean is exact even if the micro-batches have unequal weights. To report more figures, return "
        "(mean, metrics) or ((sum, weight), metrics), where metrics is {name: (sum, weight)}.",
    )
    optimizer: Callable[[list[tuple[str, nn.Parameter]]], Optimizer | Sequence[Optimizer]] = option(
        in_toml=False,
        help="Takes the model's (name, parameter) pairs. Returns one torch optimizer for all parameters (in one or "
        "more param groups), or a list of optimizers in which each parameter belongs to one optimizer.",
    )
    data: Any = option(in_toml=False, help="A map-style torch Dataset, or an iterable; see manyhands.Stream.")
    batch: Batch = option(in_toml=False, help="How the samples of a step are divided.")
    epochs: int | None = option(
        default=None,
        at_least=1,
        help="The number of passes over the data, in place of a number of steps.",
    )
    epoch_end: str = option(
        default="join",
        choices=EPOCH_ENDS,
        help="The end of an epoch. join: a step may take its last samples from the next epoch; short: the last step "
        "of an epoch may have fewer samples; drop: the samples that don't fill a step are left out.",
    )
    order: Any = option(
        default="random",
        in_toml=False,
        help="The order of the samples in an epoch: random, sequential, manyhands.weighted(...), "
        "manyhands.by_length(...), or a function (seed, epoch, place) -> index, where epoch counts from 0.",
    )
    weights: Weights | str | os.PathLike[str] | None = option(
        default=None,
        in_toml=False,
        help="Files or a run with the initial weights: a path, or Weights. None: the model's constructor supplies "
        "them. A resumed run takes its weights from the checkpoint.",
    )
    validation: Validation | Mapping[str, Validation] | None = option(
        default=None,
        in_toml=False,
        help="A manyhands.Validation, or several by name. A single one is named validation, so that its loss is "
        "validation.loss. A run may resume with other validations, because they change no bit of the training.",
    )
    average: Average | None = option(
        default=None,
        in_toml=False,
        help="A manyhands.Average: an average of the weights over the steps, which validations and exports may use.",
    )
    ema: float | None = option(
        default=None,
        at_least=0.0,
        at_most=1.0,
        help="ema = 0.999 is short for average = Average(decay=0.999).",
    )
    islands: Islands | None = option(
        default=None,
        in_toml=False,
        help="A manyhands.Islands: replicas of the model that synchronize their weights every few steps. "
        "None: one model.",
    )
    schedule: Callable[[Optimizer], LRScheduler] | None = option(
        default=None,
        in_toml=False,
        help="Builds a torch LR scheduler for an optimizer. It is called for each optimizer if there are several. The "
        "scheduler advances after every optimizer step; ReduceLROnPlateau, after every validation of `schedule_on`.",
    )
    schedule_on: str | None = option(
        default=None,
        help="The figure that ReduceLROnPlateau watches, such as validation.loss. Its validation then decides bits.",
    )
    collate: Callable[[list[Any]], Any] | None = option(
        default=None, in_toml=False, help="Makes a batch from a list of samples. None: torch's default_collate."
    )
    sample: Callable[[nn.Module], str] | None = option(
        default=None,
        in_toml=False,
        help="(model) -> str. Returns a text to show at the end of a run, for example text that the model generates. "
        "Only one worker calls it.",
    )
    precision: str = option(
        default="fp32",
        choices=PRECISIONS,
        help="fp32, or bf16: parameters and gradients in bfloat16; master weights, moments and sums in fp32.",
    )
    attributes: Mapping[str, str] = option(
        default_factory=dict,
        help="Patterns of names of modules' attributes that forward changes, and what to do with these attributes: "
        "restore (every micro-batch begins with the value from the start of the step) or keep (no result depends on "
        "them). Other attributes that carry values between micro-batches are refused.",
    )
    fractional_weights: bool = option(
        default=False,
        help="Allow weights of the loss function that are not whole numbers. By default they are refused, because "
        "`return loss, accuracy` would be taken for (sum, weight).",
    )
    buffers: Mapping[str, str] = option(
        default_factory=dict,
        help="Patterns of names, and the rule for a buffer that forward changes: mean (over the step's "
        "micro-batches), last (its value after the last micro-batch) or refuse. The first pattern that matches "
        "decides. By default it is the mean, with a warning if it may not be meaningful.",
    )
    eval_modules: tuple[str, ...] = option(
        default=(),
        help='Names of modules, or patterns ("backbone.*"), that stay in evaluation mode while training, together '
        "with their submodules: their batch norms use and keep their running statistics, and their dropout is off.",
    )
    clip_norm: float | None = option(
        default=None,
        at_least=0.0,
        help="The gradient is scaled down to this 2-norm if its norm is larger. None: the norm is only measured.",
    )
    compile: bool = option(
        default=False,
        help="Compile the model's repeated blocks with torch.compile. Part of the recipe, because it changes bits.",
    )
    seed: int = option(default=0, at_least=0, help="The run's seed.")
    threads_per_worker: int = option(
        default=1,
        at_least=1,
        help="The number of torch threads in a worker. Part of the recipe, because it changes the bits of products.",
    )
    device: str = option(
        default="cpu",
        choices=DEVICES,
        help="cpu or cuda. Part of the recipe, because their kernels give different bits.",
    )
    optimizer_kind: str | None = option(
        default=None,
        choices=OPTIMIZER_KINDS,
        help="For an optimizer that is not part of torch: elementwise (the update of an element depends on that "
        "element only) or per-parameter (the update of a parameter depends on that parameter only).",
    )
    name: str = option(default="run", in_toml=False, help="The recipe's name.")
    source: str | None = option(
        default=None,
        in_toml=False,
        help="The file that the recipe was read from, for messages and the run directory.",
    )

    def __post_init__(self) -> None:
        for field in FUNCTIONS:
            check_function(field, getattr(self, field))
        if not isinstance(self.batch, Batch):
            raise ConfigError("recipe.batch has the wrong type", expected="manyhands.Batch(...)", got=repr(self.batch))
        has_options = hasattr(self.order, "fact")  # an OrderOption, which this module can't import
        if self.order not in ORDERS if isinstance(self.order, str) else not (has_options or callable(self.order)):
            raise ConfigError(
                "recipe.order is not an order",
                expected=f"{' or '.join(ORDERS)}, manyhands.weighted(...), manyhands.by_length(...), or a function",
                got=repr(self.order)[:80],
            )
        check_options(self)
        check_average(self.average, self.ema)
        self._check_validations()
        self._check_islands()
        if self.stream is not None:
            by_epochs = {f"{name}.every": each.every for name, each in self.validations.items() if each.period.epochs}
            order, end = (None if self.order == "random" else self.order), (self.epoch_end != "join") or None
            refuse_indexed({"order": order, "epoch_end": end, "epochs": self.epochs, **by_epochs})
        if isinstance(self.weights, (str, os.PathLike)):
            object.__setattr__(self, "weights", Weights(path=self.weights))
        elif not (self.weights is None or isinstance(self.weights, Weights)):
            raise ConfigError(
                "recipe.weights has the wrong type",
                expected="a path, or manyhands.Weights(path=...)",
                got=repr(self.weights),
            )
        patterns = (self.eval_modules,) if isinstance(self.eval_modules, str) else tuple(self.eval_modules)
        object.__setattr__(self, "eval_modules", patterns)
        _check_rules("buffers", self.buffers, BUFFER_RULES)
        _check_rules("attributes", self.attributes, ATTRIBUTE_RULES)
        for field in ("compile", "fractional_weights"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(
                    f"recipe.{field} has the wrong type", expected="True or False", got=repr(getattr(self, field))
                )
        if self.compile and self.device != "cpu":
            raise ConfigError(
                "recipe.compile is supported on the CPU only: no test shows yet that the bits stay the same on a GPU",
                expected="device = cpu, or compile = false",
                got=f"device = {self.device}",
            )

    def _check_islands(self) -> None:
        if not isinstance(self.islands, (Islands, NoneType)):
            raise ConfigError(
                "recipe.islands has the wrong type", expected="manyhands.Islands(...)", got=repr(self.islands)
            )
        if self.islands is not None:
            patience = next((f"{name}.patience" for name, each in self.validations.items() if each.patience), None)
            unsupported = {
                "a stream as data": self.stream is not None,
                "an average of the weights (ema, average)": self.average_of_weights is not None,
                "schedule_on": self.schedule_on is not None,
                str(patience): patience is not None,
            }
            self.islands.check_recipe(unsupported, pretrained=self.weights is not None)

    def _check_validations(self) -> None:
        if not isinstance(self.validation, (Validation, Mapping, NoneType)):
            raise ConfigError(
                "recipe.validation has the wrong type",
                expected="manyhands.Validation(...), or a mapping of names to such objects",
                got=repr(self.validation),
            )
        for name, each in self.validations.items():
            if not isinstance(each, Validation):
                raise ConfigError(
                    f"recipe.validation[{name!r}] has the wrong type",
                    expected="manyhands.Validation(...)",
                    got=repr(each),
                )
            if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
                raise ConfigError(
                    "the name of a validation can't be used in the names of its figures",
                    expected="letters, digits, _ and -",
                    got=repr(name),
                )
            if each.weights != TRAINED and self.average_of_weights is None:
                raise ConfigError(
                    f"the validation {name!r} needs an average of the weights, but the recipe has none",
                    expected="a recipe with ema=0.999 or average=manyhands.Average(...)",
                    got=f"weights = {each.weights!r}",
                )
        if self.schedule_on is not None and self.validation_of_schedule not in self.validations:
            raise ConfigError(
                "recipe.schedule_on needs a validation",
                expected="the name of a figure of one of the recipe's validations, such as validation.loss",
                got=repr(self.schedule_on),
            )

    @property
    def stream(self) -> Stream | None:
        """Return `data` as a stream, or None if it is a map-style data set."""
        return stream_of("recipe.data", self.data)

    @property
    def num_islands(self) -> int:
        """Return the number of islands; 1 without islands."""
        return 1 if self.islands is None else self.islands.count

    def batch_index(self, step_index: int, island: int) -> int:
        """Return the index, counted from 0 over all islands, of the batch of a step of an island.

        The islands take batches in turn, so in n steps they have the samples that one model has in n steps of batches
        that are `num_islands` times as large.
        """
        return step_index * self.num_islands + island

    @property
    def average_of_weights(self) -> Average | None:
        """Return the average of the weights that `average` or `ema` asks for."""
        return self.average if self.ema is None else Average(decay=self.ema)

    @property
    def validations(self) -> Mapping[str, Validation]:
        """Return the recipe's validations by name. A single one is called "validation"."""
        if isinstance(self.validation, Mapping):
            return self.validation
        return {} if self.validation is None else {"validation": self.validation}

    @property
    def validation_of_schedule(self) -> str:
        """Return the name of the validation whose figure advances the schedule, or an empty string."""
        return str(self.schedule_on or "").partition(".")[0]

    @property
    def initial_weights(self) -> Weights | None:
        """Return `weights` as Weights. The constructor has converted it if it was a path."""
        return self.weights if isinstance(self.weights, Weights) else None


def _check_rules(field: str, rules: Mapping[str, str], known: Sequence[str]) -> None:
    for pattern, rule in rules.items():
        if rule not in known:
            raise ConfigError(
                f"recipe.{field} has an unknown rule for {pattern!r}",
                expected=f"one of {', '.join(known)}",
                got=repr(rule),
            )


@options
class Strategy:
    """The resources of a run. A strategy never changes a bit of the result. Raises ConfigError."""

    sharding: str = option(
        default="zero2",
        choices=SHARDINGS,
        flags=("--sharding",),
        help="State that is sharded over the workers. ddp: none; zero1: the optimizer's state and the master weights; "
        "zero2: also the gradients; zero3: also the parameters.",
    )
    offload: str = option(
        default="none",
        choices=OFFLOADS,
        flags=("--offload",),
        help="Where the optimizer's state and the master weights are stored; with zero3, also the parameters. none: "
        "on the device; cpu: in the host's memory, for a GPU; disk: in files, which are read before use and written "
        "in the background.",
    )
    scratch: str = option(
        default="",
        flags=("--scratch",),
        metavar="DIR",
        help="A folder on a disk for the files of offload = disk. Empty: a folder in the run directory, or in the "
        "system's folder for temporary files if there is no run directory.",
    )
    transport: str = option(
        default="auto",
        choices=TRANSPORTS,
        flags=("--transport",),
        help="How workers exchange data. shared-memory: workers on one host; distributed: torch.distributed (Gloo or "
        "NCCL); hierarchical: several hosts with the same number of CPU workers each, with shared memory inside a host "
        "and torch.distributed between hosts; auto: shared-memory if all workers are on one host's CPUs, otherwise "
        "hierarchical if it is possible, otherwise distributed.",
    )
    overlap: bool = option(
        default=True, help="Exchange a unit's gradients while backward continues. False: exchange them after backward."
    )
    units: tuple[str, ...] = option(
        default=(),
        help="Names of modules whose parameters are exchanged together. Empty: the repeated children of containers "
        "are used.",
    )
    activation_checkpointing: tuple[str, ...] = option(
        default=(),
        help='Names of modules, or patterns ("blocks.*"), whose activations are recomputed in backward instead of '
        "being stored. This takes less memory and more time.",
    )
    unshard_ahead: int = option(
        default=1,
        at_least=0,
        help="With sharded parameters, the number of units that are unsharded before they are needed.",
    )
    loader_workers: int = option(
        default=0,
        at_least=0,
        flags=("--loader-workers",),
        flag_type=int,
        metavar="N",
        help="Additional processes of each worker that read data ahead. 0: the worker reads the data itself.",
    )
    islands_state_every: int = option(
        default=10,
        at_least=1,
        help="With islands, the number of rounds between two states of an island in the place where clusters meet. "
        "Another cluster continues a lost island from the last one.",
    )
    islands_lost_after: float = option(
        default=60.0,
        at_least=1.0,
        help="With islands, the seconds after which other clusters take over the islands of a silent cluster.",
    )
    stall_seconds: float = option(
        default=600.0,
        at_least=0.1,
        flags=("--stall-seconds",),
        flag_type=float,
        metavar="SECONDS",
        help="The time for which other workers wait for a worker before it is declared stalled.",
    )

    def __post_init__(self) -> None:
        check_options(self)


def strategy_or_default(strategy: object) -> Strategy:
    """Return the strategy, or the default one for None. Raises ConfigError if it is something else."""
    if not (strategy is None or isinstance(strategy, Strategy)):
        raise ConfigError(
            "the strategy has the wrong type",
            expected='manyhands.Strategy(...), for example manyhands.Strategy(sharding="zero2")',
            got=repr(strategy),
        )
    return strategy or Strategy()
