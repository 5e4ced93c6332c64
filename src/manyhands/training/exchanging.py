"""Values and figures that all workers exchange in a training loop of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from manyhands.comm.agreement import all_gather_json
from manyhands.comm.group import Group
from manyhands.errors import ConfigError
from manyhands.formatting import format_bytes
from manyhands.metrics.metric import number, ratio
from manyhands.optim.plain_values import decode_state, exactly_encoded

MAX_BYTES = 1 << 20
"""The size of the largest value that a worker may pass to `Engine.all_gather_json`, as JSON."""

Numbers = float | Tensor | Mapping[int, float | Tensor]
"""A number, or the numbers of parts by their indices."""


class _Refused(NamedTuple):
    """The text of the error for a refused argument."""

    what: str
    expected: str
    got: str
    hint: str | None = None


def gathered(group: Group, value: object, tag: str) -> list[Any]:
    """Do the work of `Engine.all_gather_json`. Collective."""
    encoded = exactly_encoded(value)
    size = len(json.dumps(encoded))
    refused = None
    if encoded is None and value is not None:
        refused = _Refused(
            "engine.all_gather_json got a value that JSON can't hold exactly",
            "None, numbers, texts, and lists, tuples and dicts of them",
            repr(value)[:200],
            "pass value.item() or value.tolist() of a small tensor or array; pass large ones in files",
        )
    elif size > MAX_BYTES:
        refused = _Refused(
            "engine.all_gather_json got a value that is too large",
            f"at most {format_bytes(MAX_BYTES)} of JSON on each worker",
            format_bytes(size),
            "exchange counts or sums; write larger values to files",
        )
    return [decode_state(each) for each in _exchanged(group, encoded, refused, tag)]


def mean(group: Group, total: Numbers, weight: Numbers, tag: str) -> float | None:
    """Do the work of `Engine.mean`. Collective."""
    mine, refused = _parts(group.rank, total, weight)
    parts: dict[int, tuple[float, float]] = {}
    for rank, each in enumerate(_exchanged(group, mine, refused, tag)):
        for index, above, below in each:
            if index in parts:
                raise ConfigError(
                    f"engine.mean got the part {index} from two workers",
                    expected="each part from one worker",
                    got=f"worker {group.workers[rank]} also has it",
                )
            parts[index] = above, below
    totals = [0.0, 0.0]
    for index in sorted(parts):
        totals = [before + each for before, each in zip(totals, parts[index], strict=True)]
    return ratio(*totals)


def _exchanged(group: Group, value: Any, refused: _Refused | None, tag: str) -> list[Any]:
    """Return all workers' JSON values, by rank.

    Raises the same ConfigError on all workers if one of them refuses its value.
    """
    all_ranks: list[Any] = all_gather_json(group, (refused, None if refused else value), f"{tag} / control")
    for rank, (found, _) in enumerate(all_ranks):
        if found is not None:
            what, expected, got, hint = found
            where = f"worker {group.workers[rank]}"
            raise ConfigError(what, where=where, expected=expected, got=got, hint=hint)
    return [each for _, each in all_ranks]


def _parts(rank: int, total: Numbers, weight: Numbers) -> tuple[list[tuple[int, float, float]], _Refused | None]:
    """Return (index, sum, weight) of each part of this worker. A part without an index has the worker's rank."""
    by_index = [value if isinstance(value, Mapping) else {rank: value} for value in (total, weight)]
    try:
        totals, weights = ({int(key): float(number(each)) for key, each in given.items()} for given in by_index)
    except (ConfigError, TypeError, ValueError):
        expected = "numbers or tensors of one element, or mappings of indices to them"
        return [], _Refused("engine.mean got something other than a sum and a weight", expected, repr((total, weight)))
    if isinstance(total, Mapping) != isinstance(weight, Mapping) or totals.keys() != weights.keys():
        expected = "two numbers, or two mappings with the same indices"
        return [], _Refused(
            "engine.mean got sums and weights of different parts", expected, repr((total, weight))[:200]
        )
    return [(index, totals[index], weights[index]) for index in totals], None
