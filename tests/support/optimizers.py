"""Optimizers that are not torch's: some that keep values outside of the parameters' state, and some to be refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manyhands import Recipe
from support.models import GPT, VOCABULARY, WIDTH, NamedParams, OptimizerFactory, gpt_recipe, muon_and_adamw

Closure = Callable[[], float] | None


class Custom(torch.optim.Optimizer):
    """The base of these optimizers: `step` calls `update` for each parameter with a gradient."""

    def __init__(self, params: Any, **entries: Any) -> None:
        super().__init__(params, {"lr": 0.02} | entries)

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.begin(group)
            for param in group["params"]:
                if param.grad is not None:
                    self.update(group, param, param.grad, self.state[param])
        self.end()

    def begin(self, group: dict[str, Any]) -> None:
        """Called before a group's parameters are updated."""

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        """Update a parameter."""
        param.sub_(grad, alpha=group["lr"])

    def end(self) -> None:
        """Called at the end of `step`."""


class CountsInGroup(Custom):
    """As LAMB: per parameter, with a count of steps in its param groups."""

    def begin(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        if not state:
            state.update(first=torch.zeros_like(param), second=torch.zeros_like(param))
        state["first"].lerp_(grad, 0.1)
        state["second"].mul_(0.99).addcmul_(grad, grad, value=0.01)
        step = group["step"]
        update = (state["first"] / (1 - 0.9**step)) / (state["second"] / (1 - 0.99**step)).sqrt_().add_(1e-6)
        norms = param.norm(), update.norm()
        ratio = float(norms[0] / norms[1]) if all(norms) else 1.0
        param.sub_(update, alpha=group["lr"] * ratio)


class CountsInAttribute(Custom):
    """Elementwise, with counts in attributes of several types: one is made by `step`, and one changes its type."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.k, self.last, self.recent = 0, None, {"rates": [1.0], "pair": (0, "start")}

    def begin(self, group: dict[str, Any]) -> None:
        group["scaled"] = group["lr"] / (1 + self.k)

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        state.setdefault("count", torch.zeros(1)).add_(1)
        state.setdefault("since", self.k)
        state.setdefault("nothing", None)
        state["phase"] = "even" if self.k % 2 == 0 else "odd"
        factor = sum(self.recent["rates"]) * float(state["count"]) / (1 + state["since"])
        param.sub_(grad, alpha=group["scaled"] * factor + (self.last or 0.0))

    def end(self) -> None:
        self.k += 1
        self.last = 0.001 * self.k
        self.recent["rates"].append(0.5**self.k)
        self.recent["pair"] = (self.k, f"step {self.k}")
        self.made_by_step = self.k


class CountsUsedGroups(Custom):
    """Counts the steps in which a group has gradients, and only those."""

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            used = [param for param in group["params"] if param.grad is not None]
            if used:
                group["uses"] = group.get("uses", 0) + 1
            for param in used:
                param.sub_(param.grad, alpha=group["lr"] / group["uses"])


class Lookahead(torch.optim.AdamW):
    """AdamW, and slow weights that follow after every second step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        for group in self.param_groups:
            group["counter"] = 0

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and "slow" not in self.state[param]:
                    self.slow_of(param)
        super().step()
        for group in self.param_groups:
            group["counter"] += 1
            for param in group["params"] if group["counter"] % 2 == 0 else ():
                if param.grad is not None:
                    slow = self.state[param]["slow"]
                    slow.lerp_(param, 0.5)
                    param.copy_(slow)

    def slow_of(self, param: Tensor) -> None:
        """Create the state of AdamW and the slow weights."""
        self.state[param].update(
            step=torch.zeros(()),
            exp_avg=torch.zeros_like(param),
            exp_avg_sq=torch.zeros_like(param),
            slow=param.clone(),
        )


class ScheduleFree(Custom):
    """As schedule-free AdamW: a sum of weights, a mode and a maximum in its param groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, k=0, train_mode=False, weight_sum=0.0, lr_max=-1.0, beta=0.9)

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if "z" in self.state[param]:
                    param.lerp_(self.state[param]["z"], 1 - 1 / group["beta"])
            group["train_mode"] = False

    def begin(self, group: dict[str, Any]) -> None:
        if not group["train_mode"]:
            raise RuntimeError("not in train mode")
        group["k"] += 1
        group["lr_max"] = max(group["lr"] * min(1.0, group["k"] / 3), group["lr_max"])
        weight = group["lr_max"] ** 2
        group["weight_sum"] += weight
        group["ckp1"] = weight / group["weight_sum"]

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        if "z" not in state:
            state.update(z=param.clone(), exp_avg_sq=torch.zeros_like(param))
        state["exp_avg_sq"].mul_(0.99).addcmul_(grad, grad, value=0.01)
        grad.div_((state["exp_avg_sq"] / (1 - 0.99 ** group["k"])).sqrt_().add_(1e-8))
        param.lerp_(state["z"], group["ckp1"])
        param.add_(grad, alpha=group["lr_max"] * (group["beta"] * (1 - group["ckp1"]) - 1))
        state["z"].sub_(grad, alpha=group["lr_max"])


class StateFromConstructor(Custom):
    """Creates its state in the constructor, and tests whether a parameter has some."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"start": param.detach().clone(), "count": 0}

    def begin(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param not in self.state:
                raise KeyError("a parameter without state")

    def update(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        state["count"] += 1
        param.sub_(grad, alpha=group["lr"]).lerp_(state["start"], 0.1 / state["count"])


def elementwise(kind: Callable[..., torch.optim.Optimizer]) -> OptimizerFactory:
    """Return a factory that divides the parameters into two groups: matrices, and the others."""

    def factory(named: NamedParams) -> torch.optim.Optimizer:
        matrices = {"params": [param for _, param in named if param.ndim > 1]}
        return kind([matrices, {"params": [param for _, param in named if param.ndim <= 1], "lr": 0.01}])

    return factory


def schedule_free(named: NamedParams) -> torch.optim.Optimizer:
    """Return the optimizer in its training mode."""
    optimizer = elementwise(ScheduleFree)(named)
    assert isinstance(optimizer, ScheduleFree)
    optimizer.train()
    return optimizer


KEEPING_VALUES: dict[str, tuple[OptimizerFactory, str]] = {
    "count in the group": (elementwise(CountsInGroup), "per-parameter"),
    "count in an attribute": (elementwise(CountsInAttribute), "elementwise"),
    "count of uses": (elementwise(CountsUsedGroups), "elementwise"),
    "Lookahead": (elementwise(Lookahead), "elementwise"),
    "schedule-free": (schedule_free, "elementwise"),
    "state from the constructor": (elementwise(StateFromConstructor), "elementwise"),
}
"""Optimizers whose steps change values besides parameters and their state, with their kinds."""


def keeping_recipe(name: str) -> Recipe:
    """Return a recipe with one of these optimizers."""
    factory, kind = KEEPING_VALUES[name]
    return gpt_recipe(optimizer=factory, optimizer_kind=kind)


class Averaged(nn.Module):
    """A GPT with a buffer that a step hook sets to a moving average of its head, and a count of the hook's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT()
        self.register_buffer("average", torch.zeros(VOCABULARY, WIDTH))
        self.register_buffer("calls", torch.zeros(3))
        _model.newest = self

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)


_model = threading.local()


def with_hooks(named: NamedParams) -> list[torch.optim.Optimizer]:
    """Return Muon and AdamW with step hooks that change hyperparameters, and buffers of the newest `Averaged`."""
    model: Averaged = _model.newest
    optimizers = muon_and_adamw()(named)
    assert isinstance(optimizers, list)
    head = dict(named)["gpt.tokens.weight"]

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        model.calls[0] += 1
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 + float(torch.rand(())) * 0  # drawing random numbers must disturb nothing

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        model.calls[1] += model.calls[0]
        with torch.no_grad():
            model.average.lerp_(head.float(), 0.25)

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(before)
    optimizers[-1].register_step_post_hook(after)
    return optimizers


def hooked_recipe(precision: str = "fp32") -> Recipe:
    """Return the recipe of a model that is changed by step hooks."""
    return gpt_recipe(precision, model=Averaged, optimizer=with_hooks)
