"""torch optimizers applied to slices of the master weights.

The recipe's factory is called once, with the model's named parameters: what it returns (the *fronts*: one optimizer, or
several that share the parameters among them) fixes the classes, the param groups and their hyperparameters, and is what
LR schedulers change. Their own `step` never updates anything. The work is done by a copy of each, whose param groups
are, in turn, the slices of each run. That gives the same bits as one call over whole parameters if the optimizer is

- *elementwise*: an element's update depends on that element alone; a slice may be any part of a parameter; or
- *per-parameter*: it may look at a whole parameter, its shape included, but at one at a time; a slice is a whole one.
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
"""Of torch.optim."""

REFUSED = {
    "LBFGS": "it looks at all parameters together, and evaluates the loss by itself",
    "SparseAdam": "it wants sparse gradients, and those that workers exchange are dense",
}
"""Of torch.optim, and why."""

Factory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]

ParamGroups = list[list[dict[str, Any]]]
"""Of a run: for each of the optimizers its param groups over the run's slices."""


@dataclass(frozen=True)
class Slice:
    """A parameter's elements [start, start + numel) as its optimizer sees them: a view of the master weights."""

    name: str
    start: int
    master: Tensor  # fp32, [numel], or of the parameter's own shape; its .grad is a view of the run's gradient


class SlicedOptimizer:
    """See the module. fronts: what the recipe's factory returned. unsplittable: the parameters of per-parameter
    optimizers.

    declared_kind: that of optimizers that aren't torch's. Raises ConfigError.
    """

    def __init__(
        self, factory: Factory, named_params: Sequence[tuple[str, nn.Parameter]], *, declared_kind: str | None
    ) -> None:
        made = _call(factory, named_params)
        self.fronts = tuple(made) if isinstance(made, (list, tuple)) else (made,)
        if not self.fronts:
            raise ConfigError("recipe.optimizer did not return an optimizer", got=repr(made))
        self.kinds = tuple(_kind(front, declared_kind) for front in self.fronts)
        _check_plain(self.hyperparameters())
        self._front_of_group = [index for index, front in enumerate(self.fronts) for _ in front.param_groups]
        self._group_of = _groups_by_name(self._front_groups(), named_params)
        self.unsplittable = frozenset(
            name for name in self._group_of if self.kinds[self._front_of(name)] == PER_PARAMETER
        )
        self._shapes = {name: tuple(param.shape) for name, param in named_params}
        self._workers = [_worker(front) for front in self.fronts]
        self._places: dict[tuple[str, int, str], Tensor] = {}  # of state that is at a home of its own

    def _front_groups(self) -> Iterator[dict[str, Any]]:
        return (group for front in self.fronts for group in front.param_groups)

    def _front_of(self, name: str) -> int:
        return self._front_of_group[self._group_of[name]]

    def shape_of(self, name: str, numel: int) -> tuple[int, ...]:
        """The shape in which the optimizer sees a slice of `numel` elements of a parameter."""
        return self._shapes[name] if name in self.unsplittable else (numel,)

    def runs(self, slices: Sequence[Slice]) -> ParamGroups:
        """The param groups for a run over these slices, to be given to `step`."""
        groups: dict[int, list[Tensor]] = {}
        for piece in slices:
            groups.setdefault(self._group_of[piece.name], []).append(piece.master)
        run: ParamGroups = [[] for _ in self.fronts]
        for index, tensors in groups.items():
            run[self._front_of_group[index]].append({"params": tensors, "_group": index})
        return run

    def step(self, run: ParamGroups) -> None:
        """Update a run's slices from their .grad (None: left alone)."""
        for worker, groups, kind in zip(self._workers, run, self.kinds, strict=True):
            if groups:
                worker.param_groups = groups
                with bf16_products_in_fp32(kind == PER_PARAMETER):  # Muon multiplies matrices in bf16
                    worker.step()

    def refresh(self, runs: Sequence[ParamGroups]) -> None:
        """Take over the fronts' hyperparameters, as they are now (a schedule may have changed them)."""
        hyper = self.hyperparameters()
        for run in runs:
            for groups in run:
                for group in groups:
                    group.update(hyper[group["_group"]])

    def names_in_group(self, index: int) -> list[str]:
        """The parameters of one param group, sorted."""
        return sorted(name for name, group in self._group_of.items() if group == index)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """One per param group, as they are now."""
        return tuple(float(group["lr"]) for group in self._front_groups())

    def state_of(self, piece: Slice) -> dict[str, Any]:
        """The optimizer's state of a slice: tensors and numbers; empty before its first step."""
        state: dict[str, Any] = self._workers[self._front_of(piece.name)].state[piece.master]
        return state

    def load_state_of(self, piece: Slice, state: dict[str, Any]) -> None:
        """Set it. Tensors go to where the slice is; a number among them (a step count) only if the optimizer's kernels
        want it there, by the rule of torch.optim.Optimizer.load_state_dict."""
        group = list(self._front_groups())[self._group_of[piece.name]]
        beside = bool(group.get("fused") or group.get("capturable"))
        self._workers[self._front_of(piece.name)].state[piece.master] = {
            kind: value.to(piece.master.device) if isinstance(value, Tensor) and (value.dim() or beside) else value
            for kind, value in state.items()
        }

    def state_bytes(self) -> dict[str, float]:
        """For each parameter, how many bytes of state its optimizer keeps per element (of tensors of its shape), found
        by letting a copy of it update a small one."""
        by_group = []
        for index, group in enumerate(self.hyperparameters()):
            which = self._front_of_group[index]
            trial = nn.Parameter(torch.zeros((32, 32) if self.kinds[which] == PER_PARAMETER else 1024))
            trial.grad = torch.zeros_like(trial)
            worker = _worker(self.fronts[which])
            worker.param_groups = [{**group, "params": [trial]}]
            worker.step()
            tensors = [value for value in worker.state[trial].values() if isinstance(value, Tensor)]
            by_group.append(sum(tensor.nbytes for tensor in tensors if tensor.dim()) / trial.numel())
        return {name: by_group[group] for name, group in self._group_of.items()}

    def settle(self, piece: Slice, allocator: Allocator) -> list[Tensor]:
        """Move a slice's state to `home`, where torch or a checkpoint has put it elsewhere; the tensors of it there."""
        state = self.state_of(piece)
        for kind, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                key = (piece.name, piece.start, kind)
                place = self._places.get(key)
                if place is None:
                    place = self._places[key] = allocator.empty(value.numel(), value.dtype).view(value.shape)
                state[kind] = value if value is place else place.copy_(value)
        return [value for value in state.values() if isinstance(value, Tensor) and value.dim()]

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The param groups of all fronts, one after the other, without their parameters."""
        return [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in self._front_groups()
        ]

    def load_hyperparameters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Set them, as a checkpoint has them."""
        for group, loaded in zip(self._front_groups(), groups, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()})


def _call(factory: Factory, named_params: Sequence[tuple[str, nn.Parameter]]) -> Any:
    """What the factory returns. torch's Muon names no parameter when it refuses one: told here."""
    try:
        return factory(list(named_params))
    except ValueError as error:
        wrong = [name for name, param in named_params if param.ndim != 2 and str(param.size()) in str(error)]
        if "Muon only supports 2D parameters" not in str(error) or not wrong:
            raise
        raise ConfigError(
            f"torch.optim.Muon was given a parameter that is no matrix: {' or '.join(wrong[:5])}",
            expected="parameters of 2 dimensions",
            got=str(next(tuple(param.shape) for name, param in named_params if name == wrong[0])),
            hint="give it to an optimizer of its own: return [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]",
        ) from error


def _worker(front: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy that shares all but the state and the param groups."""
    worker: torch.optim.Optimizer = object.__new__(type(front))
    worker.__dict__.update(front.__dict__)
    worker.state = defaultdict(dict)
    worker.param_groups = []
    return worker


def _kind(optimizer: object, declared: str | None) -> str:
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
            f"{name} is not known: on a part of the parameters it could give other bits",
            expected=f"one of torch.optim's {', '.join(sorted(KINDS))}",
            hint="if each element's update depends on that element alone, say optimizer_kind = 'elementwise' in the"
            " recipe; if it looks at one whole parameter at a time, 'per-parameter'",
        )
    return found


def _check_plain(groups: Sequence[dict[str, Any]]) -> None:
    """Hyperparameters are written into checkpoints and compared between workers."""
    for index, group in enumerate(groups):
        for name, value in group.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            if not all(item is None or isinstance(item, (bool, int, float, str)) for item in values):
                raise ConfigError(
                    f"the optimizer's {name} (param group {index}) is not a plain number or text",
                    got=repr(value),
                    hint="give float(...) instead of a tensor",
                )


def _groups_by_name(
    groups: Iterator[dict[str, Any]], named_params: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, int]:
    names = {id(param): name for name, param in named_params}
    found: dict[str, int] = {}
    for index, group in enumerate(groups):
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                raise ConfigError(
                    f"recipe.optimizer was given a tensor that is no trainable parameter (in param group {index})",
                    got=f"shape {tuple(param.shape)}",
                    hint="make the groups from the (name, parameter) pairs that the factory gets",
                )
            if name in found:
                raise ConfigError(
                    f"two of recipe.optimizer's optimizers have the parameter {name!r}",
                    got=f"param groups {found[name]} and {index}, counted through all of them",
                    hint="give every parameter to one of them",
                )
            found[name] = index
    missing = [name for name, _ in named_params if name not in found]
    if missing:
        raise ConfigError(
            f"recipe.optimizer leaves out {len(missing)} trainable parameter(s): {', '.join(missing[:5])}",
            hint="freeze them in the model with requires_grad_(False), or put them into a param group",
        )
    return found
