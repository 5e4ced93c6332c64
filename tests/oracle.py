"""A run in plain PyTorch, in one process: all other ways of computing the recipe must have the same bits.

Autograd and torch.optim over whole parameters. The order of sums is written here once more, from its definition; of
Manyhands only the documented seeds and order of samples are used, the digest that both sides are compared by, and, on
CPUs that have no instructions for bf16, the way that its products are computed (tests/test_bf16_products.py has that
one's definition).
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import manyhands as mh
from manyhands.models.bf16_products import bf16_products_in_fp32
from manyhands.numerics.counters import derive
from support.positions import micro_batch_positions, sample_indices

BLOCK = 1024


@dataclass
class OracleRun:
    """Result of a run. digests, losses, norms, learning_rates: one per step."""

    digests: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    learning_rates: list[tuple[float, ...]] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def oracle_run(recipe: mh.Recipe, steps: int) -> OracleRun:
    """Train `steps` steps."""
    torch.set_num_threads(recipe.threads_per_worker)
    seed_everything(derive(recipe.seed, "init"))
    model = recipe.model()
    for param in model.parameters():
        param.data = param.data.contiguous()  # as the engine stores them
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    masters = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    if recipe.precision == "bf16":
        keep_in_bf16(model)
    made = recipe.optimizer(list(masters.items()))
    optimizers = made if isinstance(made, list) else [made]
    schedules = [recipe.schedule(optimizer) for optimizer in optimizers] if recipe.schedule else []
    run = OracleRun()
    for step in range(steps):
        with bf16_products_in_fp32(not recipe.compile):
            gradients, loss, weight = step_gradient(recipe, model, params, step)
        for name, master in masters.items():
            gradient = gradients[name]
            master.grad = None if gradient is None else gradient / weight
        norm = gradient_norm(list(masters.values()))
        if recipe.clip_norm is not None:
            scale = min(1.0, recipe.clip_norm / (norm + 1e-6))
            for master in masters.values():
                if master.grad is not None:
                    master.grad.mul_(scale)
        run.learning_rates.append(tuple(group["lr"] for each in optimizers for group in each.param_groups))
        with bf16_products_in_fp32():  # Muon's
            for optimizer in optimizers:
                optimizer.step()
        for schedule in schedules:
            schedule.step()
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(masters[name])
        run.digests.append(mh.digest_of_tensors(tensors_of_digest(model, masters)))
        run.losses.append(loss / weight)
        run.norms.append(norm)
    run.params = {name: master.detach() for name, master in masters.items()}
    run.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return run


def tensors_of_digest(model: nn.Module, masters: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """The master weights and persistent buffers in the order of the model's state_dict."""
    names = {id(param): name for name, param in model.named_parameters()}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) not in names:
            yield key, value
        elif names[id(value)] in masters:
            yield names[id(value)], masters[names[id(value)]]


def seed_everything(seed: int) -> None:
    """The three generators that a model, a loss or a data set may draw from."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also formats a traceback, for GPUs: 140 us


def numpy_state() -> tuple[Any, ...]:
    """The state of numpy's global generator, in a form that can be compared. Its `repr` would take a millisecond."""
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), *rest


def keep_in_bf16(model: nn.Module) -> None:
    """Return all parameters except those of batch norm."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for param in module.parameters(recurse=False):
                param.data = param.data.to(torch.bfloat16)


def step_gradient(
    recipe: mh.Recipe, model: nn.Module, params: dict[str, nn.Parameter], step: int
) -> tuple[dict[str, Tensor | None], float, float]:
    """Return the sums of a step's gradients in fp32 (None: no micro-batch has one), of losses, and of weights.

    Sets the model's buffers to what the recipe's rules say, or to the mean of the micro-batches' values.
    """
    count, accumulate = recipe.batch.micro_batches, recipe.batch.accumulate
    before = {name: buffer.clone() for name, buffer in state_of_forward(model, params)}
    gradients: dict[str, list[Tensor | None]] = {name: [] for name in params}
    buffers: dict[str, list[Tensor]] = {name: [] for name in before}
    loss_sum, weight_sum = 0.0, 0.0
    for micro_batch in range(count):
        set_buffers(model, before, params)
        for param in params.values():
            param.grad = None
        batch = load(recipe, step, micro_batch)
        seed_everything(derive(recipe.seed, "compute", step, micro_batch))
        with seeds_behind_calls(model):
            result = recipe.loss(model.train(), batch)
            loss, weight = result if isinstance(result, tuple) else (result, 1.0)
            loss.backward()
        loss_sum, weight_sum = loss_sum + float(loss.detach()), weight_sum + float(weight)
        for name, param in params.items():
            gradients[name].append(None if param.grad is None else param.grad.float())
        for name, buffer in state_of_forward(model, params):
            buffers[name].append(buffer.clone())
    last = {name for name in buffers if rule_of(recipe, name) == "last"}
    set_buffers(
        model,
        {name: values[-1] if name in last else mean_in_order(values, before[name]) for name, values in buffers.items()},
        params,
    )
    sums: dict[str, Tensor | None] = {}
    for name, values in gradients.items():
        whole = [torch.zeros(params[name].shape) if value is None else value for value in values]
        virtual_workers = [add_in_order(whole[i : i + accumulate]) for i in range(0, count, accumulate)]
        sums[name] = None if all(value is None for value in values) else add_as_tree(virtual_workers)
    return sums, loss_sum, weight_sum


@contextmanager
def seeds_behind_calls(model: nn.Module) -> Iterator[None]:
    """Behind each call of a unit, seed torch's generator, and Python's or numpy's if the call drew from them.

    Each seed is derived from the one that torch's generator had before the call, also if backward recomputes the call.
    """
    outer: list[str] = []
    followed: set[tuple[str, int]] = set()  # by a seed in forward: name, and seed before the call

    def call(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        link = (name, torch.initial_seed())
        if outer or (torch._C._current_graph_task_id() != -1 and link not in followed):
            return forward(*args, **kwargs)
        followed.add(link)
        seed = derive(torch.initial_seed(), "unit call", name)
        python, numpy = random.getstate(), numpy_state()
        outer.append(name)
        try:
            result = forward(*args, **kwargs)
        finally:  # also if torch's checkpoint ends a recomputation early
            outer.pop()
        torch.default_generator.manual_seed(seed)
        if random.getstate() != python:
            random.seed(seed)
        if numpy_state() != numpy:
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        return result

    first_names = dict(model.named_modules())
    called = {name: first_names[name] for name in units(model) if name in first_names}  # a shared module has one name
    own = [(module, module.__dict__.get("forward")) for module in called.values()]
    for name, module in called.items():
        module.__dict__["forward"] = partial(call, name, module.forward)
    try:
        yield
    finally:
        for module, forward in own:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def units(model: nn.Module, prefix: str = "", inside: bool = False) -> Iterator[str]:
    """The children of outermost lists and sequences, and the outermost other modules with parameters."""
    in_container = isinstance(model, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    for name, child in model.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from units(child, f"{prefix}{name}.", inside or isinstance(child, nn.ModuleList))
        elif inside or isinstance(model, nn.Sequential):
            yield f"{prefix}{name}"
        elif any(isinstance(module, (nn.ModuleList, nn.Sequential)) for module in child.modules()):
            yield from units(child, f"{prefix}{name}.")
        elif in_container or any(True for _ in child.parameters()):
            yield f"{prefix}{name}"


def load(recipe: mh.Recipe, step: int, micro_batch: int) -> Any:
    """Return the micro-batch's samples, collated."""
    positions = micro_batch_positions(step, micro_batch, recipe.batch)
    seed_everything(derive(recipe.seed, "data", step, micro_batch))
    indices = sample_indices(recipe.seed, len(recipe.data), positions).tolist()
    return (recipe.collate or default_collate)([recipe.data[index] for index in indices])


def add_in_order(values: list[Tensor]) -> Tensor:
    """Add left to right."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def add_as_tree(values: list[Tensor]) -> Tensor:
    """Split at the largest power of two below the length, and add both parts' trees: ((01)(23))((45)6)."""
    if len(values) == 1:
        return values[0]
    left = 1
    while 2 * left < len(values):
        left *= 2
    return add_as_tree(values[:left]) + add_as_tree(values[left:])


def mean_in_order(values: list[Tensor], before: Tensor) -> Tensor:
    """Set changed buffers to the mean over the micro-batches; integers, and equal values, to the first value."""
    if not before.is_floating_point() or all(torch.equal(value, values[0]) for value in values):
        return values[0]
    return add_in_order(values) / len(values)


def state_of_forward(model: nn.Module, trained: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a forward may change: buffers, and parameters that were frozen from the start."""
    for name, buffer in model.named_buffers():
        yield name, buffer.detach()
    for name, param in model.named_parameters():
        if name not in trained:
            yield name, param.detach()


def rule_of(recipe: mh.Recipe, name: str) -> str:
    """Return the rule of the first pattern that matches."""
    return next((rule for pattern, rule in recipe.buffers.items() if fnmatchcase(name, pattern)), "mean")


def set_buffers(model: nn.Module, values: dict[str, Tensor], trained: Container[str]) -> None:
    """Copy in place, since the model's code may refer to the tensors."""
    for name, buffer in state_of_forward(model, trained):
        buffer.copy_(values[name])


def gradient_norm(params: list[nn.Parameter]) -> float:
    """Return the norm from the 2-norms of blocks of 1,024 elements, in order; their squares are added in fp64."""
    norms = []
    for param in params:
        flat = torch.zeros(-(-param.numel() // BLOCK) * BLOCK)
        if param.grad is not None:
            flat[: param.numel()] = param.grad.flatten()
        norms.append(torch.linalg.vector_norm(flat.view(-1, BLOCK), dim=1))
    return float(torch.cat(norms).double().square().sum().sqrt())
