"""Tries an optimizer on small tensors before training, to refuse an optimizer that would fail or give other bits later.

A worker applies an optimizer to one slice of its parameters after the other, and must be able to save all that the
optimizer remembers. Whether an optimizer allows that is known only after some steps. So a copy of the optimizer makes
these steps on small tensors, once in full, as plain PyTorch would, and once slice by slice, as a worker does. Both must
give the same bits. torch's own optimizers are known to do so. For these, one step shows whether their flags suit the
device.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.errors import ConfigError
from manyhands.numerics.seeds import generators_state, preserved_generators
from manyhands.optim.plain_values import is_plain
from manyhands.optim.shared_state import SharedState, difference, other_attributes_of, shared_state_of
from manyhands.optim.working_copy import WorkingCopy, agreed, class_name, untracked
from manyhands.shard_layout import BLOCK

STEPS = 12
"""The number of steps in a trial. Some optimizers, such as Lookahead, act differently in every fifth or tenth step."""


@dataclass
class _Fake:
    """A small parameter. full: the parameter in its own shape. slices: the same values, as a worker holds them."""

    group: int
    like: Tensor  # the parameter that it stands for
    full: nn.Parameter
    slices: list[Tensor] = field(default_factory=list)


def try_out(
    front: torch.optim.Optimizer, *, elementwise: bool, tracks: bool, device: torch.device
) -> dict[tuple[int, int], float]:
    """Try an optimizer. Return the bytes of its state per element, not counting single numbers.

    The bytes are returned by param group and number of a parameter's dimensions.

    tracks: True if the optimizer is not torch's own. device: where the update computes. The optimizer, its parameters
    and all generators stay as they are. Raises ConfigError.
    """
    _check_attributes(front)
    if tracks:
        _refuse_identities(front)
    trial = _Trial(front, elementwise, tracks, device)
    before, seen = shared_state_of(front), _fingerprint(other_attributes_of(front))
    with preserved_generators():
        generators = generators_state()
        try:
            trial.run(STEPS if tracks else 1)
        except ConfigError:
            raise
        except Exception as error:  # the optimizer may raise anything
            raise ConfigError(
                f"a trial step of {class_name(front)} on small tensors failed",
                got=f"{type(error).__name__}: {error}",
                hint="its step gets parts of the parameters, in self.param_groups, and no closure; the state of a"
                " parameter must be in self.state[param]"
                if tracks
                else "check its options",
            ) from error
        if not generators.equals(generators_state()):
            raise ConfigError(
                f"{class_name(front)} draws random numbers in its step",
                expected="an update that depends only on gradients and state",
                hint="such numbers would depend on the number of workers; draw them in the loss function",
            )
    changed = difference(before, shared_state_of(front))
    now = _fingerprint(other_attributes_of(front) | other_attributes_of(trial.sliced.optimizer))
    changed = changed or next((f"attribute {name!r}" for name in now if now[name] != seen.get(name)), None)
    if changed is not None:
        raise untracked(front, changed)
    if tracks:
        trial.compare()
    return trial.state_bytes()


def _check_attributes(front: torch.optim.Optimizer) -> None:
    for name, value in vars(front).items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(item, torch.optim.Optimizer) for item in items):
            raise ConfigError(
                f"{class_name(front)} holds another optimizer, in its attribute {name!r}",
                expected="an optimizer that updates the parameters itself",
                hint="derive its class from the other optimizer's, and call super().step()",
            )
    step = vars(front).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            f"the step of {class_name(front)} was replaced on the object",
            got=repr(step),
            hint="override `step` in a class, or register a step hook",
        )


def _refuse_identities(front: torch.optim.Optimizer) -> None:
    """Raise ConfigError if the optimizer recognizes parameters by identity. It would not recognize their slices."""
    params = {id(param) for group in front.param_groups for param in group["params"]}
    entries = [
        (f"param group {index}'s {key!r}", value)
        for index, group in enumerate(front.param_groups)
        for key, value in group.items()
        if key != "params"
    ]
    attributes = [
        (f"attribute {name!r}", value)
        for name, value in vars(front).items()
        if name not in ("state", "param_groups", "defaults")
    ]
    for what, value in [*attributes, *entries]:
        for item in value if isinstance(value, (list, tuple, dict, set, frozenset)) else ():
            if item in params if isinstance(item, int) else id(item) in params and not isinstance(value, (list, tuple)):
                raise ConfigError(
                    f"{class_name(front)} holds parameters outside of its param groups, in its {what}",
                    expected="an optimizer that recognizes a parameter by its param group, its state, or an"
                    " attribute of the parameter",
                    hint="its step gets slices of the parameters, so it would take each slice for another parameter",
                )


class _Trial:
    """Two working copies of an optimizer, and small parameters.

    plain: updates full parameters in one call. sliced: updates slices in several calls; torch's own optimizers are
    updated in this way only.
    """

    def __init__(self, front: torch.optim.Optimizer, elementwise: bool, tracks: bool, device: torch.device) -> None:
        self._front, self._elementwise, self._tracks = front, elementwise, tracks
        self._fakes = list(self._make_fakes(device))
        copies = [WorkingCopy(front, tracks=tracks, in_bf16=not elementwise) for _ in range(2)]
        self.plain, self.sliced = copies
        self._shared = [shared_state_of(front)] * 2
        self._first = [fake.full.detach().clone() for fake in self._fakes]
        for fake in self._fakes:
            if tracks and fake.like in front.state:
                self._start_with_state(fake)

    def _make_fakes(self, device: torch.device) -> Iterator[_Fake]:
        for index, group in enumerate(self._front.param_groups):
            # Some optimizers treat matrices differently, so there are parameters for each number of dimensions.
            for like in {param.dim(): param for param in group["params"]}.values():
                # Make two, because an optimizer may act differently for more than one parameter.
                for number in range(2 if self._tracks else 1):
                    shape = self._shape(like)
                    count = shape.numel()
                    values = torch.linspace(-1.0, 1.0, count, device=device).add_(0.1 * number).view(shape)
                    fake = _Fake(index, like, nn.Parameter(values))
                    vars(fake.full).update(vars(like))
                    if self._elementwise:
                        flat = values.clone().view(-1)
                        fake.slices = [flat[start : start + BLOCK] for start in range(0, count, BLOCK)]
                    else:
                        fake.slices = [values.clone()]
                    for piece in fake.slices:
                        vars(piece).update(vars(like))
                    yield fake

    def _shape(self, like: Tensor) -> torch.Size:
        if not self._elementwise:
            # The state's shape may depend on the parameter's shape.
            has_state = self._tracks and like in self._front.state
            return like.shape if has_state else torch.Size(min(size, 32) for size in like.shape)
        small = [2 * BLOCK] if like.dim() == 1 else [2, *[1] * (like.dim() - 2), BLOCK]
        return torch.Size(small if like.dim() else [])

    def _start_with_state(self, fake: _Fake) -> None:
        """Set the state that the optimizer's constructor made.

        Give all elements the state of the first element of `fake.like`.
        """
        state = dict(self._front.state[fake.like])
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == fake.like.shape:
                state[key] = value.reshape(-1)[:1].expand(fake.full.numel()).view(fake.full.shape)
        self.plain.optimizer.state[fake.full] = initial_state(state, fake.full.shape, 0, fake.full)
        for index, piece in enumerate(fake.slices):
            self.sliced.optimizer.state[piece] = initial_state(state, fake.full.shape, index * BLOCK, piece)

    def run(self, steps: int) -> None:
        """Make `steps` trial steps."""
        for step in range(steps):
            for index, fake in enumerate(self._fakes):
                grad = torch.linspace(0.5, -0.25, fake.full.numel(), device=fake.full.device) / (1 + step + index)
                fake.full.grad = grad.clone().view(fake.full.shape)
                parts = torch.split(grad, BLOCK) if self._elementwise else [grad.view(fake.full.shape)]
                for piece, part in zip(fake.slices, parts, strict=True):
                    piece.grad = part
            if self._tracks:
                self._shared[0] = self._step(self.plain, [[(fake, fake.full) for fake in self._fakes]], 0)
            self._shared[1] = self._step(self.sliced, self._runs(), 1)

    def _runs(self) -> list[list[tuple[_Fake, Tensor]]]:
        """Return the slices of each run. The runs differ in their numbers of slices and groups."""
        slices = [(fake, piece) for fake in self._fakes for piece in fake.slices]
        return [slices[:1], slices[1:]] if self._elementwise and len(slices) > 1 else [[each] for each in slices]

    def _step(self, copy: WorkingCopy, runs: Sequence[list[tuple[_Fake, Tensor]]], which: int) -> SharedState:
        copy.begin_step(self._shared[which])
        tensors = [tensor for run in runs for _, tensor in run]
        addresses = [tensor.data_ptr() for tensor in tensors]
        for run in runs:
            copy.step(self._groups(run))
        if addresses != [tensor.data_ptr() for tensor in tensors]:
            raise ConfigError(
                f"the step of {class_name(self._front)} replaces the data of parameters",
                expected="an update in place: param.add_(...), or param.copy_(...)",
                got="an assignment to param.data",
            )
        return copy.end_step() or self._shared[which]

    def _groups(self, run: list[tuple[_Fake, Tensor]]) -> list[dict[str, Any]]:
        """Return the param groups for one call of `step`."""
        groups: list[dict[str, Any]] = []
        for index, group in enumerate(self._front.param_groups):
            tensors = [tensor for fake, tensor in run if fake.group == index]
            entries: dict[str, Any] = {} if self._tracks else {**group}
            names = {"param_names": ["trial"] * len(tensors)} if "param_names" in group else {}
            if tensors or self._tracks:
                groups.append(entries | {"params": tensors} | names)
        return groups

    def compare(self) -> None:
        """Raise ConfigError unless both copies have the same bits, and the optimizer can be saved."""
        name = class_name(self._front)
        agreed(self._shared[0], self._shared[1], self._front)
        kind = "elementwise" if self._elementwise else "per-parameter"
        for fake in self._fakes:
            joined = torch.cat([piece.view(-1) for piece in fake.slices]).view(fake.full.shape)
            if not torch.equal(joined.view(torch.int32), fake.full.detach().view(torch.int32)):
                raise ConfigError(
                    f"{name} is not {kind}: parts of parameters got different values than full parameters",
                    got=f"in a trial with small parameters of {fake.full.dim()} dimensions",
                    hint="set optimizer_kind = 'per-parameter' in the recipe"
                    if self._elementwise
                    else "an optimizer that uses several parameters together is not supported",
                )
            self._check_state(fake)
        for copy in (self.plain, self.sliced):
            known = {id(tensor) for fake in self._fakes for tensor in (fake.full, *fake.slices)}
            others = [key for key in copy.optimizer.state if id(key) not in known]
            if others:
                self._refuse_state(f"state[{others[0]!r}]", "only self.state[param] of the parameters in param_groups")
        moves = any(group.get("lr", 1.0) for group in self._front.param_groups)
        still = all(torch.equal(a, fake.full) for a, fake in zip(self._first, self._fakes, strict=True))
        if moves and still and not self.sliced.optimizer.state:
            raise ConfigError(
                f"{name} changed none of the small parameters in a trial",
                expected="a `step` that updates the parameters in self.param_groups",
                hint="don't keep the parameters in other attributes",
            )

    def _check_state(self, fake: _Fake) -> None:
        """Raise ConfigError if a checkpoint can't hold the optimizer's state of a parameter."""
        for piece in fake.slices:
            grad = None if piece.grad is None else piece.grad.untyped_storage().data_ptr()
            for key, value in self.sliced.optimizer.state.get(piece, {}).items():
                what = f"state[param][{key!r}] = {_described(value)}"
                strided = isinstance(value, Tensor) and value.layout == torch.strided
                if strided and value.untyped_storage().data_ptr() == grad:
                    self._refuse_state(f"{what}, which is the gradient itself", "a copy of it: param.grad.clone()")
                if not isinstance(key, str):
                    self._refuse_state(what, "keys that are text")
                if not isinstance(value, Tensor):
                    if not (is_plain(value) and not isinstance(value, (list, tuple, dict))):
                        self._refuse_state(what, "tensors, numbers and text")
                elif value.is_complex() or value.is_quantized or value.layout != torch.strided:
                    self._refuse_state(what, "dense tensors of real numbers")
                elif self._elementwise and value.numel() != 1 and value.shape != piece.shape:
                    self._refuse_state(what, "tensors of the parameter's shape, and single numbers")

    def _refuse_state(self, got: str, expected: str) -> None:
        raise ConfigError(
            f"{class_name(self._front)} keeps state that can't be divided among workers and saved",
            expected=expected,
            got=got,
        )

    def state_bytes(self) -> dict[tuple[int, int], float]:
        """Return the bytes of state per element, by group and number of dimensions."""
        found = {}
        for fake in self._fakes:
            states = [self.sliced.optimizer.state.get(piece, {}) for piece in fake.slices]
            tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
            num_bytes = sum(tensor.nbytes for tensor in tensors if tensor.dim())
            found[fake.group, fake.full.dim()] = num_bytes / fake.full.numel()
        return found


def initial_state(state: dict[str, Any], shape: Sequence[int], start: int, piece: Tensor) -> dict[str, Any]:
    """Return one slice's part of the state that an optimizer's constructor made for a parameter of this shape.

    piece: the slice, whose first element is the parameter's element `start`.
    """
    found: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            found[key] = value
        elif value.dim() and value.shape == torch.Size(shape):
            part = value.reshape(-1)[start : start + piece.numel()]
            found[key] = part.to(piece.device, copy=True).view(piece.shape)
        else:
            found[key] = value.to(piece.device, copy=True) if value.dim() else value.clone()
    return found


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {value.dtype}"
    return f"{type(value).__name__} {value!r}"[:200]


def _fingerprint(attributes: dict[str, Any]) -> dict[str, object]:
    return {name: _print_of(value, 4) for name, value in attributes.items()}


def _print_of(value: object, depth: int) -> object:
    """Return a fingerprint of `value`, which is different after `value` was changed."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, types.MethodType):
        return id(value.__func__)
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if is_plain(value) or not depth:
        return repr(value) if depth else id(value)
    if isinstance(value, dict):
        return [(_print_of(key, depth - 1), _print_of(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [_print_of(item, depth - 1) for item in value]
    inside = getattr(value, "__dict__", None)
    if isinstance(inside, dict) and not isinstance(value, (type, nn.Module)) and not callable(value):
        return [id(value), _print_of(inside, depth - 1)]
    return id(value)
