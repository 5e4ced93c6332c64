"""What training relies on while it goes on: the model's parameters are those that were laid out, and only updates
change them. Whatever else a model does to them would train it wrongly without a word, so it is refused by name."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import chain
from typing import Protocol

from torch import Tensor, nn

from manyhands.errors import ConfigError

_HINT = "make all parameters in recipe.model, before it returns: run the model once there, if it makes some in forward"


class Place(Protocol):
    """Where some parameters lie."""

    def not_bound(self) -> list[str]:
        """Those that somebody else gave other data."""


class Watch:
    """Of a model whose parameters have found their place.

    changeable: names of frozen parameters that may change, being looked after like buffers. places: of all trainable
    parameters, and of some that are frozen.
    """

    def __init__(self, model: nn.Module, changeable: Container[str], places: Sequence[Place]) -> None:
        self._model, self._places = model, places
        self._known = dict(model.named_parameters())
        self._trainable = {name for name, param in self._known.items() if param.requires_grad}
        self._versions = {name: param._version for name, param in self._known.items() if name not in changeable}
        self._still = {  # where frozen ones are: between two rounds always there, also if they're gathered
            name: param.data_ptr()
            for name, param in self._known.items()
            if not param.requires_grad and name not in changeable
        }
        self._graph_is_known = False

    def before_step(self) -> None:
        """Raises ConfigError for a gradient that would be added to the step's."""
        for name, param in self._known.items():
            if param.grad is not None:
                raise ConfigError(
                    f"parameter {name!r} has a gradient already before the step",
                    hint="set its .grad to None after a backward of your own",
                )

    def before_backward(self, loss: Tensor) -> None:
        """Raises ConfigError if a parameter gets a gradient that the model doesn't have. Looks once."""
        if self._graph_is_known:
            return
        self._graph_is_known = True
        mine = {id(param) for param in self._known.values()}
        for leaf in _leaves(loss):
            if isinstance(leaf, nn.Parameter) and id(leaf) not in mine:
                self.after_backward()  # which knows its name, if it's in the model by now
                raise ConfigError(
                    "the loss depends on a trainable parameter that the model doesn't have: it would never be updated",
                    got=f"one of shape {tuple(leaf.shape)}",
                    hint="make its module part of the model (nn.ModuleList instead of a list, say), or freeze it",
                )

    def after_backward(self) -> None:
        """After a step's last micro-batch, before anything is updated. Raises ConfigError."""
        now = dict(self._model.named_parameters())
        for name, param in now.items():
            if name not in self._known:
                raise ConfigError(f"parameter {name!r} came after the engine was made", hint=_HINT)
            if param.requires_grad and name not in self._trainable:
                raise ConfigError(
                    f"parameter {name!r} was frozen when the engine was made, and is trainable now",
                    hint="leave it trainable in recipe.model; freezing it for some steps is fine",
                )
        for name, param in self._known.items():
            if now.get(name) is not param:
                what = f"parameter {name!r} was replaced or removed after the engine was made"
                raise ConfigError(what, hint=f"write to it in recipe.model only; {_HINT}")
        elsewhere = (name for name, place in self._still.items() if self._known[name].data_ptr() != place)
        for name in chain(*(place.not_bound() for place in self._places), elsewhere):
            raise ConfigError(
                f"parameter {name!r} was given other data after the engine was made",
                hint="leave dtype and device to the recipe: no .to(), .half() or param.data = ... afterwards",
            )
        for name, version in self._versions.items():
            if self._known[name]._version != version:
                raise ConfigError(
                    f"parameter {name!r} was changed in place, and not by the optimizer",
                    hint="load weights in recipe.model; a tensor that forward changes is a buffer;"
                    " Embedding(max_norm=...) and clamping weights after a step aren't possible",
                )


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that backward would give gradients to."""
    found, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(next_node for next_node, _ in node.next_functions)
    return found
