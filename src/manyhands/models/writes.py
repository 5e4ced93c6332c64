"""Detects writes to parameters that torch doesn't count because they go through `.data`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.numerics.digest import bits_of

_PART = 1024
"""The number of elements that are compared at the start, in the middle and at the end of a parameter."""


class Sample:
    """Copies of some elements of parameters. parameters: by name.

    Parameters without memory of their own are left out.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        flat = {name: param.detach() for name, param in parameters.items() if param.is_contiguous()}
        self._parts = {name: _parts(param.view(-1)) for name, param in flat.items() if not param.is_complex()}
        self._copies = {name: [part.clone() for part in parts] for name, parts in self._parts.items()}

    def refuse_writes(self) -> None:
        """Raise ConfigError if any of the elements has changed."""
        for name, copies in self._copies.items():
            if not all(map(torch.equal, self._parts[name], copies)):
                raise changed_in_place(name)


def _parts(flat: Tensor) -> list[Tensor]:
    """Return views of some elements as integers, in which NaN equals itself."""
    bits = bits_of(flat)
    middle = flat.numel() // 2
    if flat.numel() <= 3 * _PART:
        return [bits]
    return [bits[:_PART], bits[middle : middle + _PART], bits[-_PART:]]


def changed_in_place(name: str, *, is_frozen: bool = False) -> ConfigError:
    """Return the error for a parameter that was changed by code other than the optimizer."""
    return ConfigError(
        f"parameter {name!r} was changed in place by code other than the optimizer",
        hint="a frozen parameter of this size is taken to be constant: make it a buffer; averages of weights (EMA) are"
        " best updated in a step hook of the optimizer, see docs/models.md"
        if is_frozen
        else "load weights in recipe.model; register a tensor that forward changes as a buffer;"
        " Embedding(max_norm=...) and clamping weights after a step are not supported",
    )
