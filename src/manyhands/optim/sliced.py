"""torch's own optimizers, applied to slices of the master weights, a run of elements at a time.

The recipe's factory is called once, with the model's named parameters: what it returns (the *front*) fixes the class,
the param groups and their hyperparameters, and is what an LR scheduler changes. Its own `step` never updates anything.
The work is done by a copy of it whose param groups are, in turn, the slices of each run: for an elementwise optimizer
that gives the same bits as one call over whole parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.errors import ConfigError
from manyhands.offload.home import Home

ELEMENTWISE = frozenset(
    {"AdamW", "Adam", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD"}
)  # of torch.optim; the others look at more than one element (LBFGS, Muon, Adafactor) or want sparse gradients


@dataclass(frozen=True)
class Slice:
    """A parameter's elements [start, start + numel) as the optimizer sees them: a view of the master weights."""

    name: str
    start: int
    master: Tensor  # [numel] fp32; its .grad is a view of the run's gradient


class SlicedOptimizer:
    """See the module. front: what the recipe's factory returned. Raises ConfigError."""

    def __init__(
        self,
        factory: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        named_params: Sequence[tuple[str, nn.Parameter]],
        *,
        declared_elementwise: bool,
    ) -> None:
        self.front = factory(list(named_params))
        _check_elementwise(self.front, declared_elementwise)
        _check_plain(self.hyperparameters())
        self._group_of = _groups_by_name(self.front, named_params)
        self._worker = object.__new__(type(self.front))
        self._worker.__dict__.update(self.front.__dict__)
        self._worker.state = defaultdict(dict)
        self._worker.param_groups = []

    def runs(self, slices: Sequence[Slice]) -> list[dict[str, Any]]:
        """The param groups for a run over these slices, to be given to `step`."""
        groups: dict[int, list[Tensor]] = {}
        for piece in slices:
            groups.setdefault(self._group_of[piece.name], []).append(piece.master)
        return [{"params": tensors, "_front": index} for index, tensors in groups.items()]

    def step(self, run: list[dict[str, Any]]) -> None:
        """Update a run's slices from their .grad (None: left alone)."""
        self._worker.param_groups = run
        self._worker.step()

    def refresh(self, runs: Sequence[list[dict[str, Any]]]) -> None:
        """Take over the front's hyperparameters, as they are now (a schedule may have changed them)."""
        hyper = self.hyperparameters()
        for run in runs:
            for group in run:
                group.update(hyper[group["_front"]])

    def names_in_group(self, index: int) -> list[str]:
        """The parameters of one param group, sorted."""
        return sorted(name for name, group in self._group_of.items() if group == index)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """One per param group, as they are now."""
        return tuple(float(group["lr"]) for group in self.front.param_groups)

    def state_of(self, piece: Slice) -> dict[str, Any]:
        """The optimizer's state of a slice: tensors like it, and numbers; empty before its first step."""
        state: dict[str, Any] = self._worker.state[piece.master]
        return state

    def load_state_of(self, piece: Slice, state: dict[str, Any]) -> None:
        """Set it."""
        self._worker.state[piece.master] = state

    def settle(self, piece: Slice, home: Home) -> None:
        """Move its state to `home`, where torch has made it elsewhere."""
        state = self.state_of(piece)
        for kind, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                place = home.empty(value.numel(), value.dtype).view(value.shape)
                state[kind] = place.copy_(value)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The front's param groups without their parameters."""
        return [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in self.front.param_groups
        ]

    def load_hyperparameters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Set them, as a checkpoint has them."""
        for group, loaded in zip(self.front.param_groups, groups, strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()})


def _check_elementwise(optimizer: torch.optim.Optimizer, declared: bool) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "recipe.optimizer did not return an optimizer", expected="a torch.optim.Optimizer", got=repr(optimizer)
        )
    kind = type(optimizer)
    known = kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE
    if not known and not declared:
        raise ConfigError(
            f"{kind.__module__}.{kind.__qualname__} is not known to be elementwise: a shard could get other bits",
            expected=f"one of torch.optim's {', '.join(sorted(ELEMENTWISE))}",
            hint="if each element's update depends on that element alone, set elementwise_optimizer in the recipe",
        )


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
    optimizer: torch.optim.Optimizer, named_params: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, int]:
    names = {id(param): name for name, param in named_params}
    found: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                raise ConfigError(
                    f"recipe.optimizer was given a tensor that is no trainable parameter (in param group {index})",
                    got=f"shape {tuple(param.shape)}",
                    hint="make the groups from the (name, parameter) pairs that the factory gets",
                )
            found[name] = index
    missing = [name for name, _ in named_params if name not in found]
    if missing:
        raise ConfigError(
            f"recipe.optimizer leaves out {len(missing)} trainable parameter(s): {', '.join(missing[:5])}",
            hint="freeze them in the model with requires_grad_(False), or put them into a param group",
        )
    return found
