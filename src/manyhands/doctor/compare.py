"""Finds where two runs differ: step, parameter or buffer, and block. Does not import torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manyhands.errors import ConfigError, DataError
from manyhands.listeners.run_directory import RunDirectory, table_name
from manyhands.shard_layout import BLOCK, blocks_of
from manyhands.storage.untrusted import open_inside, read_inside

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `compare_runs`.

    The steps that have a digest in both runs are compared. steps_compared: the number of these steps. equal: True if
    the digests are equal after each of them. step: the first step whose digests differ. last_equal_step: the compared
    step before `step`. tensor, block, elements: the first difference: the name of the parameter or buffer, the number
    of the block in this tensor, and the range [start, end) of elements.
    located_step: the step after which this difference was found. It is later than `step` if a run has deleted its table
    of hashes of `step`. is_buffer: True if the tensor is a buffer. tensors_differing, blocks_differing: the numbers of
    tensors and blocks that differ. differences: other differences between the two runs, such as those of
    the recipe, the numerics, the code and the data.
    """

    equal: bool
    steps_compared: int
    step: int | None = None
    last_equal_step: int | None = None
    tensor: str | None = None
    is_buffer: bool = False
    block: int | None = None
    elements: tuple[int, int] | None = None
    tensors_differing: int = 0
    blocks_differing: int = 0
    located_step: int | None = None
    differences: tuple[str, ...] = ()


def compare_runs(one: str | Path, other: str | Path) -> Comparison:
    """Compare two run directories. Raises ConfigError if there is no run or no step to compare, and DataError."""
    runs = RunDirectory.open_existing(one), RunDirectory.open_existing(other)
    first, second = (run.read_step_digests() for run in runs)
    common = sorted(first.keys() & second.keys())
    differences = _differences(*runs)
    if not common:
        raise ConfigError(
            "no step has a digest in both runs",
            got=f"digests after steps {_listed(first)} and {_listed(second)}",
            hint="train both runs with the same --digest-every",
        )
    differing = next((step for step in common if first[step] != second[step]), None)
    if differing is None:
        return Comparison(equal=True, steps_compared=len(common), differences=differences)
    before = [step for step in common if step < differing]
    found = _first_block(runs[0], runs[1], [step for step in common if first[step] != second[step]])
    return Comparison(
        equal=False,
        steps_compared=len(common),
        step=differing,
        last_equal_step=before[-1] if before else None,
        differences=differences,
        **found,  # type: ignore[arg-type]
    )


def explain_comparison(comparison: Comparison, one: str, other: str) -> str:
    """Describe the comparison in text."""
    lines = []
    if comparison.equal:
        lines.append(f"equal: {one} and {other} have the same digest after each of {comparison.steps_compared} steps")
    else:
        equal_until = comparison.last_equal_step
        since = f"the same after step {equal_until}" if equal_until else "no earlier step to compare"
        lines.append(f"different: the digests first differ after step {comparison.step} ({since})")
        if comparison.tensor is not None and comparison.elements is None:
            lines.append(f"  {comparison.tensor}")
        elif comparison.tensor is not None and comparison.elements is not None:
            lines.append(
                f"  {'buffer' if comparison.is_buffer else 'parameter'} {comparison.tensor!r}, block {comparison.block}"
                f" (elements {comparison.elements[0]} to {comparison.elements[1] - 1}): the first of"
                f" {comparison.blocks_differing} differing blocks, in {comparison.tensors_differing} parameters and"
                " buffers"
            )
            if comparison.located_step != comparison.step:
                lines.append(f"  found after step {comparison.located_step}, because older tables are deleted")
    lines += [f"  {difference}" for difference in comparison.differences]
    return "\n".join(lines)


def _listed(digests: dict[int, str]) -> str:
    steps = sorted(digests)
    return ", ".join(str(step) for step in steps[:5]) + (", ..." if len(steps) > 5 else "") if steps else "none"


def _tensors(run: RunDirectory) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Return (name, number of 32-bit words) of each tensor in a run's tables of hashes, and each buffer's numel."""
    path = run.digests / "tensors.json"
    try:
        found = json.loads(read_inside(path))
        words = [(str(name), int(words)) for name, words in found["tensors"]]
        buffers = {str(name): int(numel) for name, numel in found["buffers"].items()}
        if min([*(count for _, count in words), *buffers.values()], default=0) < 0:
            raise ValueError("a tensor has a negative size")
        return words, buffers
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError("the run's list of parameters and buffers can't be read", where=str(path), got=error) from error


def _first_block(one: RunDirectory, other: RunDirectory, differing: list[int]) -> dict[str, object]:
    """Return the first difference in the first of the steps for which both runs still have a table of hashes."""
    (names, buffers), others = _tensors(one), _tensors(other)
    if (names, buffers) != others:
        name = next((a[0] for a, b in zip(names, others[0], strict=False) if a != b), "the number of tensors")
        return {"tensor": f"{name} (the models differ)"}
    for step in differing:
        try:
            tables = [_table(run, step) for run in (one, other)]
            break
        except (OSError, ValueError, TypeError, OverflowError, SyntaxError, EOFError):
            continue  # the table can't be read, or was deleted because a run keeps only some tables
    else:
        return {}  # the difference can't be located
    if tables[0].shape != tables[1].shape:
        return {}
    unequal = np.flatnonzero(tables[0] != tables[1])
    if not len(unequal):
        return {}
    found: dict[str, object] = {"blocks_differing": len(unequal), "located_step": step}
    first, tensors = 0, 0
    for name, words in names:
        last = first + blocks_of(words)
        inside = unequal[(unequal >= first) & (unequal < last)]
        if len(inside):
            tensors += 1
            if "tensor" not in found:
                block = int(inside[0]) - first
                numel = buffers.get(name, words)  # an element of a buffer may have more or fewer than 32 bits
                ends = (block * BLOCK * numel // words, min((block + 1) * BLOCK * numel // words, numel))
                found |= {"tensor": name, "is_buffer": name in buffers, "block": block, "elements": ends}
        first = last
    return found | {"tensors_differing": tensors}


def _table(run: RunDirectory, step: int) -> NDArray[np.integer]:
    """Return the hashes of all blocks after a step, as a memory map of their file.

    Raises OSError, ValueError and similar errors.
    """
    name = table_name(step)
    open_inside(run.digests, name).close()  # refuses links and devices
    table = np.load(run.digests / name, mmap_mode="r")  # raises if the file is shorter than its header says
    if table.ndim != 1 or table.dtype.kind not in "iu":
        raise ValueError("it is not a table of hashes")
    return table  # type: ignore[no-any-return]


def _numerics(run: RunDirectory) -> dict[str, object]:
    found = run.read_manifest().get("numerics")
    if not isinstance(found, dict):
        raise DataError("manifest.json has no numerics identity", where=str((run.path / "manifest.json").absolute()))
    return found


_RECORDED = {"code": "code", "data": "prepared_data", "versions": "versions", "initial weights": "initial_weights"}
"""Entries of manifests that explain differences, by the names that people read."""


def _facts(run: RunDirectory, key: str) -> dict[str, object]:
    found = run.read_manifest().get(key)
    return found if isinstance(found, dict) else {}


def _without_strategy(run: RunDirectory) -> dict[str, object]:
    return {name: value for name, value in run.read_recipe().items() if name != "strategy"}


def _differences(one: RunDirectory, other: RunDirectory) -> tuple[str, ...]:
    found = []
    for title, first, second in (
        ("recipe", _without_strategy(one), _without_strategy(other)),
        ("amendments", one.read_amendments().as_json(), other.read_amendments().as_json()),
        ("numerics", _numerics(one), _numerics(other)),
        *((title, _facts(one, key), _facts(other, key)) for title, key in _RECORDED.items()),
    ):
        for name in dict.fromkeys([*first, *second]):
            if first.get(name) != second.get(name):
                found.append(
                    f"{title}: {name} is {first.get(name)!r:.300} in one run and {second.get(name)!r:.300} in the other"
                )
    return tuple(found)
