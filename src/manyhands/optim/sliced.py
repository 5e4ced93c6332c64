"""Applies torch optimizers to slices of the master weights.

The recipe's factory is called once, with the model's named parameters. It returns the *fronts*: one optimizer, or
several optimizers that divide the parameters among themselves. The fronts hold the param groups with their
hyperparameters, which LR schedulers change. The fronts' own `step` is never called. A working copy of each front does
the updates: for each run, the copy's param groups are replaced by groups of the run's slices. This gives the same bits
as one call over full parameters if the optimizer is

- *elementwise*: an element's update depends only on that element. A slice may be any part of a parameter.
- *per-parameter*: an update depends on one complete parameter and its shape. A slice is a complete parameter.

Optimizers of both kinds are tried before training (`trial.py`). Values that a step changes besides parameters and their
state are kept equal for all runs and all workers (`shared_state.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.errors import ConfigError
from manyhands.offload.allocator import Allocator
from manyhands.optim.fronts import hide_state
from manyhands.optim.plain_values import decode_state, encode_state, is_plain
from manyhands.optim.shared_state import SharedState, plain_attributes_of, restore_shared_state, shared_state_of
from manyhands.optim.trial import initial_state, try_out
from manyhands.optim.working_copy import WorkingCopy, agreed, class_name

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
    """A parameter's elements [start, start + numel) as its optimizer sees them: a view of the master weights.

    average: the elements' average over the steps, [numel]; None if the recipe has no average. companions: for a recipe
    with islands, the tensors of `engine.update.companions`, each [numel], by kind.
    """

    name: str
    start: int
    master: Tensor  # fp32, of shape [numel] or the parameter's own shape; its .grad is a view of the run's gradient
    average: Tensor | None = None
    companions: Mapping[str, Tensor] = field(default_factory=dict)


class SlicedOptimizer:
    """The recipe's optimizers, applied slice by slice, as the module's docstring describes.

    fronts: the optimizers that the recipe's factory returned. kinds: the kind of each front.
    unsplittable: the names of the parameters of per-parameter optimizers.
    declared_kind: the kind of optimizers whose classes are not part of torch. device: where slices are updated.
    Raises ConfigError.
    """

    def __init__(
        self,
        factory: Factory,
        named_params: Sequence[tuple[str, nn.Parameter]],
        declared_kind: str | None,
        device: torch.device,
    ) -> None:
        returned = _call(factory, named_params)
        self.fronts = tuple(returned) if isinstance(returned, (list, tuple)) else (returned,)
        if not self.fronts:
            raise ConfigError("recipe.optimizer did not return an optimizer", got=repr(returned))
        self.kinds = tuple(_kind(front, declared_kind) for front in self.fronts)
        self.plain_hyperparameters()
        self._front_of_group = [index for index, front in enumerate(self.fronts) for _ in front.param_groups]
        self._group_of = _groups_by_name(self._front_groups(), named_params)
        self.unsplittable = frozenset(
            name for name in self._group_of if self.kinds[self._front_of(name)] == PER_PARAMETER
        )
        self._shapes = {name: tuple(param.shape) for name, param in named_params}
        self._of_params = {name: dict(vars(param)) for name, param in named_params}
        self._given_names = _given_names(self._front_groups(), named_params)
        self._state_bytes: dict[tuple[int, int], float] = {}
        self._copies = [self._tried(index, device) for index in range(len(self.fronts))]
        # The state that the constructors made, until all slices have their own state.
        self._initial = self._initial_states(named_params)
        self._first_attributes = [plain_attributes_of(front) for front in self.fronts]
        for front in self.fronts:
            hide_state(front)
        # The state tensors in the allocator's buffers, by parameter, first element and key. Used only with offload
        # "disk".
        self._offloaded: dict[tuple[str, int, str], Tensor] = {}

    def _tried(self, which: int, device: torch.device) -> WorkingCopy:
        """Try a front before training. Return its working copy."""
        front, elementwise = self.fronts[which], self.kinds[which] == ELEMENTWISE
        tracks = not _is_torchs(front)
        state_bytes = try_out(front, elementwise=elementwise, tracks=tracks, device=device)
        first = self._front_of_group.index(which) if front.param_groups else 0
        self._state_bytes |= {(first + group, dims): value for (group, dims), value in state_bytes.items()}
        return WorkingCopy(front, tracks=tracks, in_bf16=not elementwise)  # Muon multiplies matrices in bf16

    def _initial_states(self, named_params: Sequence[tuple[str, nn.Parameter]]) -> dict[str, dict[str, Any]]:
        """Return the state that constructors of optimizers other than torch's made, by parameter."""
        found = {}
        for name, param in named_params:
            which = self._front_of(name)
            state = self.fronts[which].state
            if self._copies[which].tracks and param in state:
                found[name] = state[param]
        return found

    def _front_groups(self) -> Iterator[dict[str, Any]]:
        return (group for front in self.fronts for group in front.param_groups)

    def _front_of(self, name: str) -> int:
        return self._front_of_group[self._group_of[name]]

    def shape_of(self, name: str, numel: int) -> tuple[int, ...]:
        """Return the shape in which the optimizer sees a slice of `numel` elements of a parameter."""
        return self._shapes[name] if name in self.unsplittable else (numel,)

    def runs(self, slices: Sequence[Slice]) -> ParamGroups:
        """Return the param groups for a run over these slices, to be passed to `step`."""
        run: ParamGroups = [[] for _ in self.fronts]
        used = {self._group_of[piece.name] for piece in slices}
        for index, (which, front_group) in enumerate(zip(self._front_of_group, self._front_groups(), strict=True)):
            copy = self._copies[which]
            if index in used or (copy.tracks and any(self._front_of_group[other] == which for other in used)):
                mine = [piece for piece in slices if self._group_of[piece.name] == index]
                group: dict[str, Any] = {"params": [piece.master for piece in mine], "_group": index}
                if "param_names" in front_group:
                    group["param_names"] = [self._given_names[piece.name] for piece in mine]
                run[which].append(group)
        for piece in slices:
            # A step may read an attribute of a parameter, such as param.lr_scale.
            vars(piece.master).update(self._of_params[piece.name])
            if piece.name in self._initial:
                state = initial_state(self._initial[piece.name], self._shapes[piece.name], piece.start, piece.master)
                self._copies[self._front_of(piece.name)].optimizer.state[piece.master] = state
        return run

    def drop_initial_state(self) -> None:
        """Free the state that constructors made, after `runs` was called for all slices."""
        self._initial.clear()

    def begin_step(self, runs: Sequence[ParamGroups]) -> None:
        """Start a step over these runs, from the hyperparameters that the fronts have now."""
        hyper = self.hyperparameters()
        for front, copy in zip(self.fronts, self._copies, strict=True):
            if copy.tracks:
                copy.begin_step(shared_state_of(front))
        for run in runs:
            for groups, copy in zip(run, self._copies, strict=True):
                for group in groups if not copy.tracks else ():
                    group.update(hyper[group["_group"]])

    def step(self, run: ParamGroups) -> None:
        """Update the slices of a run of elements from their `grad`. Slices whose `grad` is None are not changed."""
        for copy, groups in zip(self._copies, run, strict=True):
            if groups:
                copy.step(groups)

    def end_step(self, all_gather: Callable[[object], Sequence[Any]]) -> None:
        """Copy the state that a step changes once for all parameters to the fronts. Collective if any front isn't
        torch's own.

        all_gather: returns the values of all workers, by rank. Raises ConfigError if the values differ.
        """
        if not any(copy.tracks for copy in self._copies):
            return
        mine = [copy.end_step() for copy in self._copies]
        gathered = all_gather([None if state is None else encode_state(vars(state)) for state in mine])
        for index, (front, copy) in enumerate(zip(self.fronts, self._copies, strict=True)):
            if copy.tracks:
                found = [SharedState(**decode_state(states[index])) for states in gathered if states[index] is not None]
                shared = found[0] if found else copy.step_without_gradients()
                for other in found[1:]:
                    shared = agreed(shared, other, front)
                restore_shared_state(front, shared)

    def names_in_group(self, index: int) -> list[str]:
        """Return the names of one param group's parameters, sorted."""
        return sorted(name for name, group in self._group_of.items() if group == index)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Return the current learning rate of each param group that has one."""
        return tuple(float(group["lr"]) for group in self._front_groups() if group.get("lr") is not None)

    def state_of(self, piece: Slice) -> dict[str, Any]:
        """Return the optimizer's state of a slice: tensors and numbers. It is empty before the slice's first step."""
        # Reading a missing entry must not create it, because some optimizers test whether it exists.
        state: dict[str, Any] = self._copies[self._front_of(piece.name)].optimizer.state.get(piece.master, {})
        return state

    def load_state_of(self, piece: Slice, state: dict[str, Any]) -> None:
        """Set the optimizer's state of a slice. Tensors are moved to the slice's device.

        A tensor of one number (such as a step count) is moved only if the kernels are fused or capturable, as in
        torch.optim.Optimizer.load_state_dict.
        """
        states = self._copies[self._front_of(piece.name)].optimizer.state
        states.pop(piece.master, None)
        if not state:
            return
        group = list(self._front_groups())[self._group_of[piece.name]]
        moves_numbers = bool(group.get("fused") or group.get("capturable"))
        device = piece.master.device
        states[piece.master] = {
            kind: value.to(device) if isinstance(value, Tensor) and (value.dim() or moves_numbers) else value
            for kind, value in state.items()
        }

    def state_bytes(self) -> dict[str, float]:
        """Return the bytes of optimizer state per element of each parameter, not counting single numbers.

        The bytes were measured in the trial before training.
        """
        return {name: self._state_bytes[group, len(self._shapes[name])] for name, group in self._group_of.items()}

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
        """Set the hyperparameters of all param groups."""
        for group, loaded in zip(self._front_groups(), groups, strict=True):
            group.update(loaded)

    def attributes(self) -> list[dict[str, Any]]:
        """Return the plain attributes of each front that isn't torch's own."""
        pairs = zip(self.fronts, self._copies, strict=True)
        return [plain_attributes_of(front) if copy.tracks else {} for front, copy in pairs]

    def changed_attributes(self) -> list[dict[str, Any]]:
        """Return the attributes of each front that steps have changed."""
        return [
            {name: value for name, value in now.items() if name not in first or repr(first[name]) != repr(value)}
            for first, now in zip(self._first_attributes, self.attributes(), strict=True)
        ]

    def load_attributes(self, changed: Sequence[dict[str, Any]]) -> None:
        """Set the attributes that `changed_attributes` returned. Reset all others to their initial values."""
        for front, first, attributes, copy in zip(
            self.fronts, self._first_attributes, changed, self._copies, strict=True
        ):
            if copy.tracks:
                shared = shared_state_of(front)
                restore_shared_state(front, SharedState(first | attributes, shared.groups, shared.used))

    def plain_hyperparameters(self) -> list[dict[str, Any]]:
        """Return the hyperparameters. Raises ConfigError unless all of them are plain.

        They are saved, and compared between workers.
        """
        groups = self.hyperparameters()
        for index, group in enumerate(groups):
            for name, value in group.items():
                if not is_plain(value):
                    raise ConfigError(
                        f"the optimizer's {name} (param group {index}) is not a plain number or text",
                        got=repr(value),
                        hint="pass float(...) instead of a tensor",
                    )
        return groups


def _call(factory: Factory, named_params: Sequence[tuple[str, nn.Parameter]]) -> Any:
    """Call the factory. If torch's Muon refuses a parameter, raise a ConfigError that names the parameter."""
    try:
        return factory(list(named_params))
    except (AttributeError, TypeError) as error:
        error.add_note(
            "recipe.optimizer is called with one argument: a list of the trainable parameters as (name, parameter) "
            "pairs. torch's optimizers take such pairs, also in param groups."
        )
        raise
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


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    return class_name(optimizer).startswith("torch.optim.") and type(optimizer).__name__ in KINDS


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
    name, kind = class_name(optimizer), type(optimizer).__name__
    is_torchs = name.startswith("torch.optim.")
    if is_torchs and kind in REFUSED:
        raise ConfigError(
            f"{name} can't be used: {REFUSED[kind]}",
            expected=f"one of torch.optim's {', '.join(sorted(KINDS))}",
        )
    found = KINDS.get(kind, declared) if is_torchs else declared
    if found is None:
        raise ConfigError(
            f"{name} is not known: applied to slices of parameters it could give different bits",
            expected=f"one of torch.optim's {', '.join(sorted(KINDS))}",
            hint="if each element's update depends only on that element, set optimizer_kind = 'elementwise' in the"
            " recipe; if it depends on one complete parameter at a time, set 'per-parameter'",
        )
    return found


def _given_names(groups: Iterator[dict[str, Any]], named_params: Sequence[tuple[str, nn.Parameter]]) -> dict[str, str]:
    """Return the names that the param groups list for their parameters, by the parameters' names in the model."""
    names = {id(param): name for name, param in named_params}
    pairs = (pair for group in groups for pair in zip(group["params"], group.get("param_names", ()), strict=False))
    return {names[id(param)]: given for param, given in pairs}


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
