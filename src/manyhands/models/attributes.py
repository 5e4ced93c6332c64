"""Checks that forward carries nothing from one micro-batch to the next in the attributes of modules.

Which micro-batches a worker computes depends on the number of workers, so a value that forward leaves in an attribute
would make the result depend on this number, too. Checkpoints don't hold attributes either. Therefore:

- An attribute that forward sets once, to the same value whatever the micro-batch, is a cache of constants. It may stay.
- Every other attribute that forward changes is refused by name, unless the recipe has a rule for it.
- The rule "restore" sets an attribute back, before every micro-batch, to its value at the start of the step.
- The rule "keep" declares that no result depends on the attribute: a log, for example.

To tell caches from state, the attributes are compared around the first micro-batches of each worker. After its first
change, an attribute is set back once. The next micro-batch may change it to the same value again, since a cache of
constants does not depend on the samples. Later micro-batches must not change it again. A counter fails this second
test. Workers compare the values at the end of the first step, and of each later step in which one of them has found an
attribute that forward sets for the first time.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from fnmatch import fnmatchcase
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from manyhands.errors import ConfigError
from manyhands.numerics.values import attributes_of, generator_of, is_empty_dict, is_scalar, plain_values, slots_of

WATCHED = 6
"""The attributes are compared around each worker's first WATCHED micro-batches, and around the first two micro-batches
of each of the first WATCHED steps.
"""

LOSS = "recipe.loss"
"""The name of the loss function in the names of its attributes."""

_MANAGED = frozenset(("_parameters", "_buffers", "_modules", "training"))
"""Attributes of the model's modules that the engine manages itself."""

_OPAQUE = frozenset(("torch", "logging", "threading", "concurrent", "asyncio", "manyhands", "weakref", "io"))
"""Packages whose objects are not examined: their attributes say nothing about the model's results."""

Values = dict[str, dict[str, str]]
"""The plain values inside each attribute, by the attribute's name."""


class AttributeGuard:
    """Watches the attributes of a model's modules, as described at the top of this file.

    rules: "restore" or "keep", by pattern of names. loss: the loss function. If it is an object of a class with
    `__call__`, its attributes are watched, too.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, str], loss: object = None) -> None:
        self._model, self._rules = model, rules
        self._modules: dict[str, Any] = dict(model.named_modules())
        if hasattr(loss, "__dict__") and not isinstance(loss, (FunctionType, MethodType, partial, type)):
            self._modules[LOSS] = loss
        self._watched = 0  # micro-batches
        self._steps = self._in_step = 0  # the number of steps begun, and of micro-batches watched in the current step
        self._to_restore: Values = {}  # positions of iterators with the rule "restore" at the start of the step
        self._sets_anew = False  # True if forward has set an attribute since the last comparison between workers
        self._rule_of: dict[str, str | None] = {}
        self._restores = "restore" in rules.values()
        self._at_start: dict[str, Callable[[], Any]] = {}
        self._set: dict[str, dict[str, str]] = {}  # values to which forward has set attributes, by attribute

    def begin_step(self) -> None:
        """Store the values that the rule "restore" sets back."""
        self._steps, self._in_step, self._to_restore = self._steps + 1, 0, {}
        self._store()

    def _store(self) -> None:
        if self._restores:
            self._at_start = {
                name: _saved(value, contents=True, seen={})
                for name, _, value in self._attributes()
                if self._rule(name) == "restore"
            }

    def restore(self) -> None:
        """Set the attributes with the rule "restore" back to their values at the start of the step."""
        if self._restores:
            for name, module, _ in list(self._attributes()):
                if self._rule(name) == "restore":
                    _put(module, name, self._at_start.get(name))

    @contextmanager
    def preserved(self) -> Iterator[Callable[[], bool]]:
        """Context for code between two steps. At the end, set attributes back, except those with the rule "keep".

        Yields a function that sets them back within the block, and returns True if there was an attribute to set back.
        """
        self._store()
        before, seen = self._values(), self._not_saved()
        saved = {
            name: _saved(value, contents=True, seen=seen)
            for name, _, value in self._attributes()
            if self._rule(name) is None
        }

        def put_back() -> bool:
            after, found = self._values(), False
            for name in dict.fromkeys([*before, *after]):
                if before.get(name) != after.get(name) and self._rule(name) is None:
                    _put(self._module_of(name), name, saved.get(name))
                    found = True
            return found

        try:
            yield put_back
        finally:
            put_back()
            self.restore()

    def _not_saved(self) -> dict[int, Callable[[], Any]]:
        """Return, for `_saved`, the objects in attributes whose contents are left as they are.

        They are the model's modules, parameters and buffers, which the engine manages, and the parameters of modules
        outside of the model, which may be large.
        """
        objects: list[Any] = [*self._model.modules(), *self._model.parameters(), *self._model.buffers()]
        for _, _, value in self._attributes():
            if is_scalar(value) or is_empty_dict(value):
                continue
            others = (leaf for leaf in tree_leaves(value) if isinstance(leaf, nn.Module))
            objects += (param for module in others for param in module.parameters())
        return {id(each): partial(_itself, each) for each in objects}

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Context for one micro-batch. Raises ConfigError for an attribute that forward must not change."""
        self.restore()
        if self._watched >= WATCHED and (self._steps > WATCHED or self._in_step >= 2):
            yield
            return
        before, seen = self._values(), dict[int, Callable[[], Any]]()
        self._check_restored(before)
        saved = {name: _saved(value, contents=False, seen=seen) for name, _, value in self._attributes()}
        yield
        self._watched, self._in_step = self._watched + 1, self._in_step + 1
        after = self._values()
        changed = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
        changed = [name for name in changed if self._rule(name) is None]
        for name in changed:
            if name in self._set and self._set[name] != after.get(name):
                how = "to a different value than in the previous micro-batch"
                raise _refusal(name, self._set[name], after.get(name), how)
        self._set_back([name for name in changed if name not in self._set], before, after, saved)

    def _check_restored(self, values: Values) -> None:
        """Raise ConfigError for an iterator that the rule "restore" could not set back."""
        for name, inside in values.items():
            value = {key: text for key, text in inside.items() if ".position" in key}
            if self._rule(name) == "restore" and self._to_restore.setdefault(name, value) != value:
                error = _refusal(name, self._to_restore[name], value, "in a way that can't be undone")
                error.hint = (
                    "the rule 'restore' can't set back generator functions and iterators over other iterators: use a"
                    " list and an index"
                )
                raise error

    def _set_back(
        self, names: Sequence[str], before: Values, after: Values, saved: Mapping[str, Callable[[], Any]]
    ) -> None:
        """Set back the attributes that forward has changed for the first time.

        The next micro-batch then shows whether forward changes them to the same values again. Raises ConfigError if an
        attribute can't be set back, because forward has changed a tensor or a generator itself.
        """
        for name in names:
            _put(self._module_of(name), name, saved.get(name))
        now = self._values() if names else {}
        for name in names:
            if now.get(name) != before.get(name):
                raise _refusal(name, before.get(name), after.get(name), "in place")
            self._set[name], self._sets_anew = after.get(name, {}), True

    @property
    def sets_anew(self) -> bool:
        """Return True if forward has set an attribute for the first time since the last call of `assigned`."""
        return self._sets_anew

    def assigned(self) -> dict[str, dict[str, str]]:
        """Return the values to which forward has set attributes so far, to be compared between workers."""
        self._sets_anew = False
        return self._set

    def _rule(self, name: str) -> str | None:
        if name not in self._rule_of:
            found = (rule for pattern, rule in self._rules.items() if fnmatchcase(name, pattern))
            self._rule_of[name] = next(found, None)
        return self._rule_of[name]

    def _module_of(self, name: str) -> Any:
        return self._modules[name.rpartition(".")[0]]

    def _attributes(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield the name, the module and the value of each attribute that the engine doesn't manage.

        Modules that forward creates are left out. If they have parameters or buffers, other checks refuse them.
        """
        for path, module in self._modules.items():
            # weight_norm, spectral_norm and pruning recompute a tensor before each forward.
            hooks = getattr(module, "_forward_pre_hooks", {}).values()
            computed = {getattr(hook, "name", None) for hook in hooks} | {
                getattr(hook, "_tensor_name", None) for hook in hooks
            }
            for name, value in list(vars(module).items()):
                managed = _MANAGED if path != LOSS else ("_parameters", "training")
                if name not in managed and name not in computed:
                    yield f"{path}.{name}" if path else name, module, value

    def _values(self) -> Values:
        known = {id(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        known |= {id(module) for module in self._model.modules()}
        # A model may register hooks in its first forward. torch numbers them across the process.
        hooks = (value for name, _, value in self._attributes() if name.endswith("_hooks") and isinstance(value, dict))
        known |= {id(hook) for found in hooks for hook in found.values() if isinstance(hook, FunctionType)}

        def attributes(value: object) -> Mapping[str, Any] | None:
            found = _examined(value)
            if found is not None:
                known.add(id(value))  # objects that many modules share, such as configs, are examined once
            if isinstance(value, nn.Module):  # a module outside of the model, whose parameters may be large
                others = {name: param for name, param in value._parameters.items() if id(param) not in known}
                found = {**vars(value), "_parameters": {name: getattr(p, "_version", 0) for name, p in others.items()}}
            return found

        return {name: plain_values("", value, attributes, known) for name, _, value in self._attributes()}


def _examined(value: object) -> Mapping[str, Any] | None:
    """Return the attributes of an object that may carry state, or None for an object that is not examined."""
    if isinstance(value, nn.Module):
        return vars(value)
    package = type(value).__module__
    if package.partition(".")[0] in _OPAQUE and not package.startswith("torch.distributions"):
        return None
    return attributes_of(value)


def _put(module: Any, name: str, saved: Callable[[], Any] | None) -> None:
    """Set an attribute to the value that `saved` restores, or remove the attribute if `saved` is None."""
    attribute = name.rpartition(".")[2]
    if saved is None:
        vars(module).pop(attribute, None)
    else:
        vars(module)[attribute] = saved()


def _saved(value: Any, *, contents: bool, seen: dict[int, Callable[[], Any]]) -> Callable[[], Any]:
    """Return a function that sets `value` and the containers in it back to their present state, and returns `value`.

    contents: True to set the elements of tensors and arrays, and the states of random generators, back as well.
    """
    if is_scalar(value):
        return partial(_itself, value)
    if id(value) in seen:
        return seen[id(value)]
    if is_empty_dict(value):
        seen[id(value)] = restore_empty = partial(_empty, value)
        return restore_empty
    seen[id(value)] = lambda: value  # for containers that contain themselves
    seen[id(value)] = restore = _restorer(value, contents, seen)
    return restore


def _restorer(value: Any, contents: bool, seen: dict[int, Callable[[], Any]]) -> Callable[[], Any]:
    def save(item: Any) -> Callable[[], Any]:
        return _saved(item, contents=contents, seen=seen)

    restore: Callable[[], object] | None = None
    if isinstance(value, (Tensor, np.ndarray)):
        restore = _restorer_of_elements(value) if contents else None
    elif (generator := generator_of(value)) is not None:
        restore = partial(generator.put, generator.get()) if contents else None
    elif isinstance(value, (list, deque)):
        restore = partial(_refill, value, [save(item) for item in value])
    elif isinstance(value, dict):
        restore = partial(_refill_dict, value, {key: save(item) for key, item in value.items()})
    elif isinstance(value, set):
        restore = partial(_refill_set, value, set(value))
    elif isinstance(value, tuple):
        restore = partial(_call_all, [save(item) for item in value])
    elif isinstance(value, Iterator):
        # The values that an iterator has yet to yield are contents.
        return _restorer_of_iterator(value) if contents else partial(_itself, value)
    elif _examined(value) is not None:
        restore = _restorer_of_object(value, save)

    def restored() -> Any:
        if restore is not None:
            restore()
        return value

    return restored


def _restorer_of_iterator(value: Iterator[Any]) -> Callable[[], Any]:
    """Return a function that returns a copy of an iterator at its present position, or the iterator itself if it can't
    be copied.

    Copies of iterators over another iterator (itertools.cycle, zip) would share the other one.
    """
    if not (isinstance(value, itertools.count) or type(value).__name__.endswith("_iterator")):
        return partial(_itself, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, for itertools.count
            return partial(copy, copy(value))
    except TypeError:
        return partial(_itself, value)


def _restorer_of_object(value: Any, save: Callable[[Any], Callable[[], Any]]) -> Callable[[], object]:
    attributes = save(vars(value)) if hasattr(value, "__dict__") else None
    slots = {name: save(getattr(value, name)) for name in slots_of(type(value)) if hasattr(value, name)}

    def restore() -> None:
        if attributes is not None:
            attributes()
        for name in slots_of(type(value)):
            if name in slots:
                object.__setattr__(value, name, slots[name]())  # the __setattr__ of a frozen dataclass raises an error
            elif hasattr(value, name):
                object.__delattr__(value, name)

    return restore


def _itself(value: Any) -> Any:
    return value


def _call_all(functions: Iterable[Callable[[], Any]]) -> list[Any]:
    return [function() for function in functions]


def _empty(container: dict[Any, Any]) -> dict[Any, Any]:
    container.clear()
    return container


def _refill(container: Any, items: Iterable[Callable[[], Any]]) -> None:
    values = _call_all(items)
    container.clear()
    container.extend(values)


def _refill_dict(container: dict[Any, Any], items: Mapping[Any, Callable[[], Any]]) -> None:
    values = {key: item() for key, item in items.items()}
    container.clear()
    container.update(values)


def _refill_set(container: set[Any], members: set[Any]) -> None:
    container.clear()
    container.update(members)


def _restorer_of_elements(value: Any) -> Callable[[], object]:
    if isinstance(value, Tensor):
        own = value.detach()
        for dim, stride in enumerate(own.stride() if own.layout == torch.strided else ()):
            if stride == 0 and own.shape[dim] > 1:  # expanded: torch refuses to write the same element many times
                own = own.narrow(dim, 0, 1)
        return partial(own.copy_, own.clone())
    return partial(np.copyto, value, value.copy()) if value.flags.writeable else partial(_itself, value)


def _refusal(name: str, before: dict[str, str] | None, after: dict[str, str] | None, how: str) -> ConfigError:
    old, new = before or {}, after or {}
    of_loss = name.startswith(f"{LOSS}.")
    inside = next((key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)), "")
    if "random generator" in new.get(inside, ""):
        advice = (
            "draw from the global generators (torch.rand without a generator), which are seeded for each micro-batch"
        )
    else:
        advice = (
            "register a tensor that forward changes as a buffer. If each micro-batch may start with the value that the"
            " attribute had at the start of the step (the loss function reads it within the micro-batch, for example),"
            f" set attributes={{{name!r}: 'restore'}} in mh.Recipe. If no result depends on it (a log, a cache that is"
            " filled anew before it is read, or a table that depends on lengths only), set"
            f" attributes={{{name!r}: 'keep'}}"
            f' (in a recipe file: attributes = {{ "{name}" = "keep" }})'
        )
    if of_loss:
        advice = "keep state of a loss function in buffers of the model, which the loss function gets; " + advice
    return ConfigError(
        f"the loss function changed its attribute {name!r} {how}"
        if of_loss
        else f"forward changed the attribute {name!r} of the model {how}",
        where=f"{name}{inside}",
        expected=old.get(inside, "nothing"),
        got=new.get(inside, "nothing"),
        hint="which micro-batches a worker computes depends on the number of workers, so no value may be carried from"
        f" one to the next: {advice}",
    )


def refuse_differences(by_rank: Sequence[dict[str, dict[str, str]]], workers: Sequence[int]) -> None:
    """Raise ConfigError if forward has set an attribute to different values on two workers.

    by_rank: `AttributeGuard.assigned` of all workers. workers: their numbers, by rank.
    """
    first: dict[str, tuple[int, dict[str, str]]] = {}
    for rank, values in enumerate(by_rank):
        for name, value in values.items():
            other, expected = first.setdefault(name, (rank, value))
            if value != expected:
                error = _refusal(name, expected, value, "to different values on two workers")
                error.where = f"{error.where}; workers {workers[other]} and {workers[rank]}"
                raise error
