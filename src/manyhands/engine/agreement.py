"""Facts that must match between workers, and between a run and its checkpoints.

A fact is a name and a value. Both are strings.
"""

from __future__ import annotations

import functools
import hashlib
import os
import types
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from manyhands.comm.agreement import agree, all_gather_json
from manyhands.comm.group import Group
from manyhands.config import Recipe
from manyhands.data.sample_order import order_fact, sample_order_of
from manyhands.models.attributes import refuse_differences
from manyhands.models.building import evict_model
from manyhands.numerics.digest import digest_of, fingerprint, tensor_hashes, words_of
from manyhands.numerics.values import no_attributes, plain_values
from manyhands.offload.allocator import Allocator
from manyhands.optim.sliced import SlicedOptimizer

ORDER_PLACES = 256
"""The number of positions in the first epoch at which a user's order is compared."""


def recipe_facts(recipe: Recipe) -> dict[str, str]:
    """Return the recipe's settings that decide the bits of what a checkpoint holds, without the rules for buffers.

    The only fact about functions and data is len(data). See `buffer_rules` for buffers.
    """
    facts = {
        f"batch.{name}": str(getattr(recipe.batch, name)) for name in ("global_size", "micro_size", "virtual_workers")
    }
    names = ["precision", "clip_norm", "seed", "threads_per_worker", "device"]
    if recipe.compile:  # only if it is set, because checkpoints from before this option existed lack the fact
        names.append("compile")
    for name in names:
        facts[name] = str(getattr(recipe, name))
    # The rule "keep" changes no bit. It is not compared, so that a run that refused an attribute can resume with this
    # rule.
    if restored := [pattern for pattern, rule in recipe.attributes.items() if rule == "restore"]:
        facts["attributes that are restored"] = ", ".join(restored)
    if recipe.eval_modules:
        facts["eval_modules"] = ", ".join(sorted(set(recipe.eval_modules)))
    if recipe.epoch_end != "join":
        facts["epoch_end"] = recipe.epoch_end
    # The average decides no bit of the training, but a run with another rule could not continue the saved average.
    if recipe.average_of_weights is not None:
        facts["average of the weights"] = str(recipe.average_of_weights)
    if recipe.islands is not None:
        facts["islands"] = str(recipe.islands)
    if recipe.schedule_on is not None:
        facts |= _facts_of_schedule_on(recipe)
    if recipe.stream is not None:
        return facts | recipe.stream.facts(recipe.batch.micro_batches)
    if callable(recipe.order):
        facts["order"] = f"a function, {_places_of_order(recipe)}"
    else:
        facts |= order_fact(recipe.order)
    return facts | {"len(data)": str(len(recipe.data))}


def _places_of_order(recipe: Recipe) -> str:
    """Return a hash of the samples that a user's order gives for some positions of the first epoch.

    The order's code is not compared, because it may call other code, and its bytecode depends on the version of Python.
    """
    places = sorted({number * 2_654_435_761 % len(recipe.data) for number in range(ORDER_PLACES)})  # spread evenly
    try:
        found = sample_order_of(recipe).at(places)
    except Exception as error:  # loading the first step raises the error again, with its position
        return f"which raises {type(error).__name__}"
    return f"samples {hashlib.sha256(str(found).encode()).hexdigest()[:16]}"


def _facts_of_schedule_on(recipe: Recipe) -> dict[str, str]:
    """Return the facts about the validation that decides learning rates, and so the bits of the training."""
    name = recipe.validation_of_schedule
    validation = recipe.validations[name]
    options = ("every", "batch", "samples", "at_start", "weights")
    facts = {f"{name}.{option}": str(getattr(validation, option)) for option in options}
    return facts | {"schedule_on": str(recipe.schedule_on), f"len({name}.data)": str(len(validation.data))}


def buffer_rules(rules: Mapping[str, str]) -> dict[str, str]:
    """Return the fact about the rules for buffers, or nothing if there are none. rules: as text, or one per buffer."""
    return {"buffers": str(dict(rules))} if rules else {}


def function_facts(recipe: Recipe) -> dict[str, str]:
    """Return the names of the recipe's functions, and the options that these functions hold.

    Options are numbers, text, tensors and containers of them. They are found in arguments of functools.partial, in
    defaults, in variables that a nested function uses, and in the attributes of a callable object. Global variables are
    left out. Text with a slash is left out, too, because paths may differ between hosts.
    """
    facts: dict[str, str] = {}
    for name in ("model", "loss", "optimizer", "schedule", "collate", "sample", "order"):
        if callable(getattr(recipe, name)):
            _add_function(facts, name, getattr(recipe, name), set())
    return facts


def _add_function(facts: dict[str, str], name: str, function: Any, seen: set[int]) -> None:
    """Add the facts of a function, and of the functions that it holds. seen: the ids of the functions already added."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if hasattr(function, "__qualname__"):
        facts[name] = f"{function.__module__}.{function.__qualname__}"
    elif not isinstance(function, functools.partial):
        facts[name] = f"an object of type {type(function).__module__}.{type(function).__qualname__}"
    for option, value in _held_by(function).items():
        inner = f"{name}, {option}"
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial, type)):
            _add_function(facts, inner, value, seen)
        else:
            found = plain_values(inner, value, no_attributes)
            facts |= {key: text for key, text in found.items() if not (text[:1] in "'\"" and os.sep in text)}


def _held_by(function: Any) -> dict[str, Any]:
    """Return the values that a function holds, by name: arguments, defaults, variables of the enclosing function,
    attributes.
    """
    if isinstance(function, functools.partial):
        arguments = {f"argument {index}": value for index, value in enumerate(function.args)}
        return {"the function": function.func} | arguments | function.keywords
    if isinstance(function, types.FunctionType):
        code, defaults = function.__code__, function.__defaults__ or ()
        names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        held = {variable: cell.cell_contents for variable, cell in cells if _has_value(cell)}
        return dict(zip(names, defaults, strict=True)) | (function.__kwdefaults__ or {}) | held
    if isinstance(function, (type, types.MethodType)):  # a method's object may hold any values, such as loggers
        return {}
    return dict(getattr(function, "__dict__", {}))


def _has_value(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def agree_on_functions(recipe: Recipe, group: Group) -> None:
    """Check that the recipe's functions have the same options on all workers. Collective. Raises ConfigError."""
    agree(
        group,
        "recipe",
        function_facts(recipe),
        hint="compute the options of the recipe's functions from the recipe alone, not from the rank, the time or an"
        " unseeded random generator; if a function acts on one worker only, let it read the rank when it is called",
    )


def buffer_facts(buffers: Mapping[str, Tensor]) -> dict[str, str]:
    """Return fingerprints of a model's buffers, and of small frozen parameters that are managed like buffers."""
    return {
        f"buffer {name}": f"{value.dtype}, shape {tuple(value.shape)}, "
        + digest_of([(name, words_of(value))], tensor_hashes(value))[:16]
        for name, value in buffers.items()
    }


def agree_on_start(buffers: Mapping[str, Tensor], data: Mapping[str, str], group: Group) -> None:
    """Check, before the first step, that all workers have the same buffers and data. Collective. Raises ConfigError.

    data: facts about a part of the data: name -> text.
    """
    agree(
        group,
        "model",
        buffer_facts(buffers),
        hint="build the same model on every worker: don't use the rank, the time, an unseeded random generator, or"
        " uninitialized memory (torch.empty)",
    )
    agree(
        group,
        "data",
        data,
        hint="give every worker all of the data, which Manyhands divides itself. Don't divide the data by rank, and"
        " don't use the time, a generator without a seed, or files that differ between hosts",
    )


def agree_on_attributes(assigned: Mapping[str, Mapping[str, str]], group: Group) -> None:
    """Check that forward set no attribute to different values on two workers. Collective. Raises ConfigError.

    assigned: the plain values to which forward has set attributes on this worker, by attribute.
    """
    all_workers: Sequence[Any] = all_gather_json(group, assigned, "attributes / control")
    refuse_differences(all_workers, group.workers)


def optimizer_facts(optimizer: SlicedOptimizer) -> dict[str, str]:
    """Return the optimizers' classes, and each param group's hyperparameters and parameter names.

    For optimizers that aren't torch's own, also return their plain attributes.
    """
    kinds = zip(optimizer.fronts, optimizer.kinds, strict=True)
    facts = {"optimizer": ", ".join(f"{type(front).__qualname__} ({kind})" for front, kind in kinds)}
    for index, group in enumerate(optimizer.hyperparameters()):
        facts.update({f"optimizer group {index}.{key}": str(value) for key, value in group.items()})
        facts[f"optimizer group {index}.params"] = " ".join(optimizer.names_in_group(index))
    for index, attributes in enumerate(optimizer.attributes()):
        facts.update({f"optimizer {index}.{name}": str(value) for name, value in attributes.items()})
    return facts


def frozen_facts(model: nn.Module, pending: Container[str], allocator: Allocator) -> dict[str, str]:
    """Return fingerprints of the frozen parameters, which the digest doesn't cover since no step changes them.

    pending: names of the parameters that have no values yet; they are left out.
    allocator: the allocator of the parameters' buffers.
    """
    facts = {}
    for name, param in model.named_parameters():
        if not (param.requires_grad or name in pending):
            facts[f"frozen parameter {name}"] = fingerprint(name, param)
            evict_model([param], allocator)
    return facts


def agree_on_model(model: nn.Module, pending: Collection[str], group: Group, allocator: Allocator) -> None:
    """Check that every worker built the same model, bit for bit. Collective. Raises ConfigError.

    pending: names of the parameters that have no values yet; only their shapes are compared.
    allocator: the allocator of the parameters' buffers.
    """
    facts = {}
    for name, param in model.named_parameters():
        values = "pending" if name in pending else fingerprint(name, param)
        facts[name] = f"{list(param.shape)} {param.requires_grad} {values}"
        evict_model([param], allocator)
    agree(
        group,
        "model",
        facts,
        hint="build the same model on every worker: don't use the rank, the time or an unseeded random generator",
    )
