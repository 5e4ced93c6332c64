"""Optimizers that give other bits on slices, or that keep what can't be saved; each with a part of the error."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from support.optimizers import Closure, CountsInGroup, Custom


class CountsParameters(Custom):
    """Counts updates of parameters, instead of steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.updates = 0

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        self.updates += 1
        param.sub_(grad, alpha=group["lr"] / self.updates)


class AdaptsToAllGradients(Custom):
    """As D-Adaptation: a number in the param group depends on all gradients."""

    def begin(self, group: dict[str, Any]) -> None:
        group["d"] = group.get("d", 0.0) + sum(float(param.grad.abs().sum()) for param in group["params"])


class DecaysMatrices(Custom):
    """Treats matrices differently from vectors."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        param.sub_(grad, alpha=group["lr"] * (0.5 if param.ndim > 1 else 1.0))


class ClipsGlobally(Custom):
    """Divides all gradients by their common norm."""

    def begin(self, group: dict[str, Any]) -> None:
        torch.nn.utils.clip_grad_norm_(group["params"], 0.1)


class ChangesInTheTenthStep(Custom):
    """Elementwise at first."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        param.sub_(grad if state["step"] < 10 else grad / grad.norm(), alpha=group["lr"])


class AddsNoise(Custom):
    """As Langevin dynamics."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        param.sub_(grad + torch.randn_like(grad), alpha=group["lr"])


class AddsOwnNoise(Custom):
    """Draws from a generator of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.generator = torch.Generator().manual_seed(0)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        param.sub_(grad, alpha=group["lr"] * float(torch.rand((), generator=self.generator)))


class KeepsAList(Custom):
    """Keeps a list of gradients for each parameter."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        state.setdefault("history", []).append(grad.clone())


class KeepsTwoRows(Custom):
    """Keeps one tensor of twice the parameter's size."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        state["moments"] = torch.stack([grad, grad * grad])


class KeepsGlobalState(Custom):
    """Keeps a number in `state` that belongs to no parameter."""

    def end(self) -> None:
        self.state["all"]["step"] = self.state["all"].get("step", 0) + 1  # type: ignore[index]


class KeepsTensorInGroup(Custom):
    """Counts steps in a tensor in the param group."""

    def begin(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", torch.zeros(())) + 1


class KeepsTensorInAttribute(Custom):
    """Counts steps in a tensor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.steps = torch.zeros(())

    def end(self) -> None:
        self.steps += 1


class KeepsObject(Custom):
    """Counts steps in an object, and keeps the last learning rates."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.rates: deque[float] = deque(maxlen=3)

    def end(self) -> None:
        self.rates.append(self.param_groups[0]["lr"])


class KeepsMomentsByPosition(Custom):
    """Keeps its moments in an attribute, in the order of the parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.moments = [torch.zeros_like(param) for group in self.param_groups for param in group["params"]]

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        self.moments[0].add_(grad)


class KeepsParameters(Custom):
    """Updates the parameters that its constructor was given."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.everything = [param for group in self.param_groups for param in group["params"]]

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for param in self.everything:
            if param.grad is not None:
                param.sub_(param.grad)


class KnowsIds(Custom):
    """Excludes parameters whose ids it keeps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.excluded = [id(param) for group in self.param_groups for param in group["params"] if param.dim() == 1]


class KnowsParameters(Custom):
    """Excludes parameters that are in a set."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.excluded = {param for group in self.param_groups for param in group["params"] if param.dim() == 1}


class KeepsTheGradient(Custom):
    """Keeps the gradient itself, whose memory the next gradient takes."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        param.sub_(state.get("previous", grad), alpha=group["lr"])
        state["previous"] = grad


class AssignsData(Custom):
    """Puts another tensor in place of the parameter's."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        param.data = param.data - group["lr"] * grad


class Wraps(torch.optim.Optimizer):
    """Calls another optimizer."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.SGD(params, lr=0.1)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self.inner.step()


class NeedsClosure(Custom):
    """Evaluates the loss twice, as SAM does."""

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("needs a closure")


def replaced_step(params: Any) -> torch.optim.Optimizer:
    """Return an optimizer whose step was replaced."""
    optimizer = torch.optim.SGD(params, lr=0.1)
    step = optimizer.step
    optimizer.step = lambda closure=None: step()  # type: ignore[method-assign]
    return optimizer


E, P = "elementwise", "per-parameter"
REFUSED: list[tuple[Any, str, str]] = [
    (CountsParameters, E, "depends on which parts it is given"),
    (CountsParameters, P, "attribute 'updates'"),
    (AdaptsToAllGradients, E, "param group 0's 'd'"),
    (DecaysMatrices, E, "DecaysMatrices is not elementwise"),
    (CountsInGroup, E, "CountsInGroup is not elementwise"),
    (ClipsGlobally, E, "set optimizer_kind = 'per-parameter'"),
    (ClipsGlobally, P, "an optimizer that uses several parameters together is not supported"),
    (ChangesInTheTenthStep, E, "is not elementwise"),
    (AddsNoise, E, "AddsNoise draws random numbers in its step"),
    (AddsOwnNoise, E, "attribute 'generator'"),
    (KeepsAList, E, "state[param]['history'] = list"),
    (KeepsAList, P, "state[param]['history'] = list"),
    (KeepsTwoRows, E, "state[param]['moments'] = a tensor of shape [2, 1024]"),
    (KeepsGlobalState, E, "state['all']"),
    (KeepsTensorInGroup, E, "entry 'step' of param group 0"),
    (KeepsTensorInAttribute, E, "attribute 'steps'"),
    (KeepsObject, E, "attribute 'rates'"),
    (KeepsMomentsByPosition, P, "a trial step of"),
    (KeepsParameters, E, "changed none of the small parameters"),
    (KnowsIds, E, "holds parameters outside of its param groups, in its attribute 'excluded'"),
    (KnowsParameters, P, "holds parameters outside of its param groups, in its attribute 'excluded'"),
    (KeepsTheGradient, E, "which is the gradient itself"),
    (AssignsData, E, "replaces the data of parameters"),
    (Wraps, E, "holds another optimizer, in its attribute 'inner'"),
    (NeedsClosure, E, "RuntimeError: needs a closure"),
    (replaced_step, E, "was replaced on the object"),
    (lambda params: torch.optim.AdamW(params, capturable=True, foreach=False), E, "a trial step of"),
    (lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1), capturable=True), E, "not a plain number or text"),
]
"""(factory, kind, part of the error)."""
