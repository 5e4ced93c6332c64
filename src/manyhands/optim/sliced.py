"""Applies torch optimizers to slices of the master weights.

The recipe's factory is called once, with the model's named parameters. It returns the *fronts*: one optimizer, or
several optimizers that divide the parameters among themselves. The fronts hold the param groups with their
hyperparameters, which LR schedulers change. The fronts' own `step` never updates anything. A working copy of each front
does the updates: for each run, the copy's param groups are replaced by groups of the run's slices. This gives the same
bits as one call over full parameters if the optimizer is

- *elementwise*: an element's update depends only on that element. A slice may be any part of a parameter.
- *per-parameter*: an update depends on one complete parameter and its shape. A slice is a complete parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.errors import ConfigError
from manyhands.models.bf16_products import bf16_products_in_fp32
from manyhands.offload.allocator import Allocator

ELEMENTWISE, PER_PARAMETER = "elementwise", "per-parameter"

KINDS = dict.fromkeys(
    ("AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD"), ELEMENTWISE
) | dict.fromkeys(("Muon", "Adafactor"), PER_PARAMETER)
"""The supported classes of torch.optim, and their kinds."""

REFUSED = {
    "LBFGS": "it uses all parameters together, and evaluates the loss itself",
    "SparseAdam": "it requires sparse gradients, and workers exchange dense ones",
}
"""The classes of torch.optim that can't be used, and the reasons."""

Factory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]

ParamGroups = list[list[dict[str, Any]]]
"""The param groups of each optimizer over the slices of one run."""


@dataclass(frozen=True)
class Slice:
    """A parameter's elements [start, start + numel) as its optimizer sees them: a view of the master weights."""

    name: str
    start: int
    master: Tensor  # fp32, of shape [numel] or the parameter's own shape; its .grad is a view of the run's gradient


class SlicedOptimizer:
    """The recipe's optimizers, applied slice by slice, as the module's docstring describes.

    fronts: the optimizers that the recipe's factory returned. kinds: the kind of each front.
    unsplittable: the names of the parameters of per-parameter optimizers.
    declared_kind: the kind of optimizers whose classes are not part of torch. Raises ConfigError.
    """

    def __init__(
        self, factory: Factory, named_params: Sequence[tuple[str, nn.Parameter]], *, declared_kind: str | None
    ) -> None:
        returned = _call(factory, named_params)
        self.fronts = tuple(returned) if isinstance(returned, (list, tuple)) else (returned,)
        if not self.fronts:
            raise ConfigError("recipe.optimizer did not return an optimizer", got=repr(returned))
        self.kinds = tuple(_kind(front, declared_kind) for front in self.fronts)
        _check_plain(self.hyperparameters())
        self._front_of_group = [index for index, front in enumerate(self.fronts) for _ in front.param_groups]
        self._group_of = _groups_by_name(self._front_groups(), named_params)
        self.unsplittable = frozenset(
            name for name in self._group_of if self.kinds[self._front_of(name)] == PER_PARAMETER
        )
        self._shapes = {name: tuple(param.shape) for name, param in named_params}
        self._copies = [_working_copy(front) for front in self.fronts]
        # The state tensors in the allocator's buffers, by parameter, first element and key. Used only with offload
        # "disk".
        self._offloaded: dict[tuple[str, int, str], Tensor] = {}

    def _front_groups(self) -> Iterator[dict[str, Any]]:
        return (group for front in self.fronts for group in front.param_groups)

    def _front_of(self, name: str) -> int:
        return self._front_of_group[self._group_of[name]]

    def shape_of(self, name: str, numel: int) -> tuple[int, ...]:
        """Return the shape in which the optimizer sees a slice of `numel` elements of a parameter."""
        return self._shapes[name] if name in self.unsplittable else (numel,)

    def runs(self, slices: Sequence[Slice]) -> ParamGroups:
        """Return the param groups for a run over these slices, to be passed to `step`."""
        groups: dict[int, list[Tensor]] = {}
        for piece in slices:
            groups.setdefault(self._group_of[piece.name], []).append(piece.master)
        run: ParamGroups = [[] for _ in self.fronts]
        for index, tensors in groups.items():
            run[self._front_of_group[index]].append({"params": tensors, "_group": index})
        return run

    def step(self, run: ParamGroups) -> None:
        """Update the slices of a run of elements from their `grad`. Slices whose `grad` is None are not changed."""
        for copy, groups, kind in zip(self._copies, run, self.kinds, strict=True):
            if groups:
                copy.param_groups = groups
                with bf16_products_in_fp32(kind == PER_PARAMETER):  # Muon multiplies matrices in bf16
                    copy.step()

    def refresh(self, runs: Sequence[ParamGroups]) -> None:
        """Copy the fronts' current hyperparameters, which a schedule may have changed, to the runs' param groups."""
        hyper = self.hyperparameters()
        for run in runs:
            for groups in run:
                for group in groups:
                    group.update(hyper[group["_group"]])

    def names_in_group(self, index: int) -> list[str]:
        """Return the names of one param group's parameters, sorted."""
        return sorted(name for name, group in self._group_of.items() if group == index)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Return the current learning rate of each param group."""
        return tuple(float(group["lr"]) for group in self._front_groups())

    def state_of(self, piece: Slice) -> dict[str, Any]:
        """Return the optimizer's state of a slice: tensors and numbers. It is empty before the slice's first step."""
        state: dict[str, Any] = self._copies[self._front_of(piece.name)].state[piece.master]
        return state

    def load_state_of(self, piece: Slice, state: dict[str, Any]) -> None:
        """Set the optimizer's state of a slice. Tensors are moved to the slice's device.

        A tensor of one number (such as a step count) is moved only if the kernels are fused or capturable, as in
        torch.optim.Optimizer.load_state_dict.
        """
        group = list(self._front_groups())[self._group_of[piece.name]]
        moves_numbers = bool(group.get("fused") or group.get("capturable"))
        device = piece.master.device
        self._copies[self._front_of(piece.name)].state[piece.master] = {
            kind: value.to(device) if isinstance(value, Tensor) and (value.dim() or moves_numbers) else value
            for kind, value in state.items()
        }

    def state_bytes(self) -> dict[str, float]:
        """Return the bytes of optimizer state per element of each parameter, not counting single numbers.

        The bytes are measured: a copy of the optimizer updates a small parameter.
        """
        by_group = []
        for index, group in enumerate(self.hyperparameters()):
            which = self._front_of_group[index]
            trial = nn.Parameter(torch.zeros((32, 32) if self.kinds[which] == PER_PARAMETER else 1024))
            trial.grad = torch.zeros_like(trial)
            copy = _working_copy(self.fronts[which])
            copy.param_groups = [{**group, "params": [trial]}]
            copy.step()
            tensors = [value for value in copy.state[trial].values() if isinstance(value, Tensor)]
            by_group.append(sum(tensor.nbytes for tensor in tensors if tensor.dim()) / trial.numel())
        return {name: by_group[group] for name, group in self._group_of.items()}

    def offload_state(self, piece: Slice, allocator: Allocator) -> list[Tensor]:
        """Move a slice's state to buffers of `allocator`, and return these tensors.

        torch and checkpoints create state tensors in memory. A tensor that is already in its buffer is not copied.
        """
        state = self.state_of(piece)
        for kind, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                key = (piece.name, piece.start, kind)
                buffer = self._offloaded.get(key)
                if buffer is None:
                    buffer = self._offloaded[key] = allocator.empty(value.numel(), value.dtype).view(value.shape)
                state[kind] = value if value is buffer else buffer.copy_(value)
        return [value for value in state.values() if isinstance(value, Tensor) and value.dim()]

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Return the param groups of all fronts, one after the other, without their parameters."""
        return [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in self._front_groups()
        ]

    def load_hyperparameters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Set the hyperparameters of all param groups from a checkpoint, where tuples have become lists."""
        for group, loaded in zip(self._front_groups(), groups, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()})


def _call(factory: Factory, named_params: Sequence[tuple[str, nn.Parameter]]) -> Any:
    """Call the factory. If torch's Muon refuses a parameter, raise a ConfigError that names the parameter."""
    try:
        return factory(list(named_params))
    except ValueError as error:
        wrong = [name for name, param in named_params if param.ndim != 2 and str(param.size()) in str(error)]
        if "Muon only supports 2D parameters" not in str(error) or not wrong:
            raise
        raise ConfigError(
            f"torch.optim.Muon was given a parameter that is not a matrix: {' or '.join(wrong[:5])}",
            expected="parameters of 2 dimensions",
            got=str(next(tuple(param.shape) for name, param in named_params if name == wrong[0])),
            hint="use a separate optimizer for it: return [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]",
        ) from error


def _working_copy(front: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return a copy that shares everything with `front` except state and param groups."""
    copy: torch.optim.Optimizer = object.__new__(type(front))
    copy.__dict__.update(front.__dict__)
    copy.state = defaultdict(dict)
    copy.param_groups = []
    return copy


def _kind(optimizer: object, declared: str | None) -> str:
    """Return the optimizer's kind.

    declared: the kind if the class is not part of torch. Raises ConfigError if the kind is unknown.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "recipe.optimizer did not return an optimizer",
            expected="a torch.optim.Optimizer, or a list of them",
            got=repr(optimizer),
        )
    kind = type(optimizer)
    name, is_torchs = f"{kind.__module__}.{kind.__qualname__}", kind.__module__.startswith("torch.optim")
    if is_torchs and kind.__name__ in REFUSED:
        raise ConfigError(
            f"{name} can't be used: {REFUSED[kind.__name__]}",
            expected=f"one of torch.optim's {', '.join(sorted(KINDS))}",
        )
    found = KINDS.get(kind.__name__, declared) if is_torchs else declared
    if found is None:
        raise ConfigError(
            f"{name} is not known: applied to slices of parameters it could give different bits",
            expected=f"one of torch.optim's {', '.join(sorted(KINDS))}",
            hint="if each element's update depends only on that element, set optimizer_kind = 'elementwise' in the"
            " recipe; if it depends on one complete parameter at a time, set 'per-parameter'",
        )
    return found


def _check_plain(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError unless all hyperparameters are plain numbers or text.

    They are written to checkpoints and compared between workers.
    """
    for index, group in enumerate(groups):
        for name, value in group.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            if not all(item is None or isinstance(item, (bool, int, float, str)) for item in values):
                raise ConfigError(
                    f"the optimizer's {name} (param group {index}) is not a plain number or text",
                    got=repr(value),
                    hint="pass float(...) instead of a tensor",
                )


def _groups_by_name(
    groups: Iterator[dict[str, Any]], named_params: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, int]:
    """Return each parameter's param group. Raises ConfigError unless each trainable parameter is in exactly one."""
    names = {id(param): name for name, param in named_params}
    found: dict[str, int] = {}
    for index, group in enumerate(groups):
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                raise ConfigError(
                    f"recipe.optimizer was given a tensor that is not a trainable parameter (in param group {index})",
                    got=f"shape {tuple(param.shape)}",
                    hint="create the groups from the (name, parameter) pairs that the factory is called with",
                )
            if name in found:
                raise ConfigError(
                    f"two of recipe.optimizer's optimizers have the parameter {name!r}",
                    got=f"param groups {found[name]} and {index}, numbered across all optimizers",
                    hint="pass every parameter to exactly one of them",
                )
            found[name] = index
    missing = [name for name, _ in named_params if name not in found]
    if missing:
        raise ConfigError(
            f"recipe.optimizer leaves out {len(missing)} trainable parameter(s): {', '.join(missing[:5])}",
            hint="freeze them in the model with requires_grad_(False), or add them to a param group",
        )
    return found
