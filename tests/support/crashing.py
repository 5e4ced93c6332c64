"""Saves, killed at every system call that changes a file: what is there then, and after the next save.

    python crashing.py SCENARIO ROOT STRIDE [FIRST]

A scenario saves step 2, mostly where step 1 is there. ROOT: a folder, or an address, in which each try has its own.
Every STRIDE-th call is one try, from the FIRST on. Prints a JSON object: calls by name, tries, and `wrong`: what was
lost, torn or left.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints
from manyhands.storage.location import Address, Location, location_of
from support.models import ConvNet, conv_recipe
from support.threads import run_threads
from support.tracer import Traced, traced


class FrozenStem(ConvNet):
    """A model whose first convolution isn't trained, so that there is also a folder of frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1.weight.requires_grad_(False)


RECIPE = conv_recipe(model=FrozenStem, batch=mh.Batch(global_size=4, micro_size=2))


@functools.cache
def engine_after(steps: int, changed: bool = False) -> mh.Engine:
    """Return an engine after some steps. changed: True to change its weights after these steps."""
    engine = mh.Engine(RECIPE)
    for batch in engine.batches(steps):
        engine.step(batch)
    if changed:
        with torch.no_grad():
            engine.updater.refill(lambda piece: piece.master.add_(1.0))
    return engine


def nothing_there(root: Location) -> None:
    """Create nothing: the save writes the first checkpoint."""


def one_there(root: Location) -> None:
    """Create a checkpoint that the save replaces, because only the last one is kept."""
    engine_after(1).save(root)


def same_step_there(root: Location) -> None:
    """Create a checkpoint of the same step with other weights, which the save replaces."""
    one_there(root)
    engine_after(2, changed=True).save(root)


def leftovers_there(root: Location) -> None:
    """Create a checkpoint, and what a save leaves that was killed in the middle."""
    one_there(root)
    if isinstance(root, Address):
        (root / "step-00000002" / "0123456789abcdef" / "worker-0.safetensors").write_text("half")
    else:
        for name in (".step-00000002.partial", ".step-00000001.old.partial"):
            (root / name).mkdir()
            (root / name / "worker-0.safetensors").write_text("half")


def save(root: Location, said: int) -> None:
    """Save a checkpoint of step 2. This is the call that is killed."""
    engine_after(2).save(root, keep=1, published=lambda _: os.write(said, b"published") and None)


def save_by_two(root: Location, said: int) -> None:
    """Save a checkpoint of step 2 with two workers, which are threads."""

    def work(group: Any) -> None:
        with mh.Engine(RECIPE, mh.Strategy(sharding="zero2"), group=group) as engine:
            for batch in engine.batches(2):
                engine.step(batch)
            engine.save(root, keep=1, published=lambda _: os.write(said, b"published") and None)

    run_threads(2, work)


SCENARIOS: dict[str, tuple[Callable[[Location], None], Callable[[Location, int], None]]] = {
    "nothing there": (nothing_there, save),
    "one there": (one_there, save),
    "same step there": (same_step_there, save),
    "leftovers there": (leftovers_there, save),
    "two workers": (one_there, save_by_two),
}


def files(root: Location) -> Counter[str]:
    """Count the files by name, without the names of the attempts that wrote them."""
    if isinstance(root, Address):
        return Counter(f"{name.partition('/')[0]}/{name.rpartition('/')[2]}" for name in root.files())
    return Counter(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def found_in(root: Location, checker: mh.Engine) -> dict[int, str]:
    """Load all checkpoints. Return their digests by step."""
    digests = {}
    for step, checkpoint in list_checkpoints(root):
        checker.load(checkpoint)
        digests[step] = checker.digest()
    return digests


def check(root: Location, before: dict[int, str], after: dict[int, str], trace: Traced, checker: mh.Engine) -> None:
    """Check that a kill has lost, torn and left nothing. Raises AssertionError, or the error of loading."""
    found = found_in(root, checker)
    assert not before or max(found) >= max(before), f"lost: {sorted(before)} before, {sorted(found)} now"
    for step, digest in found.items():
        assert digest in (before.get(step), after.get(step)), f"step {step} is neither as before nor as saved"
    if b"published" in trace.output:
        assert found.get(2) == after[2], "what was said to be published isn't there"
    elif not trace.was_killed:
        raise AssertionError("it was never published")
    engine_after(3).save(root, keep=1)
    left = files(root)
    frozen = {name for name in left if name.startswith("frozen-")}
    expected = {"step-00000003/manifest.json", "step-00000003/worker-0.safetensors"} | frozen
    assert set(left) == expected, f"left: {sorted(set(left) - expected)}"
    assert set(left.values()) == {1}, f"left: {left}"
    assert found_in(root, checker).keys() == {3}, "the next save isn't there"


def main() -> None:
    name, text, stride, *first = sys.argv[1:]
    prepare, work = SCENARIOS[name]
    root, checker, wrong, number = location_of(text), mh.Engine(RECIPE), [], int(*first or "1")
    for steps in (1, 2, 3):
        engine_after(steps)
    after = {1: engine_after(1).digest(), 2: engine_after(2).digest()}
    tries = 0
    while True:
        folder = root / f"{number:04d}"
        prepare(folder)
        before = found_in(folder, checker)
        trace = traced(lambda said: work(folder, said), number)  # noqa: B023
        try:
            check(folder, before, after, trace, checker)
        except Exception as error:
            wrong.append(f"killed at call {number} ({trace.calls[-1]}): {type(error).__name__}: {error}")
        if isinstance(folder, Path):
            shutil.rmtree(folder)
        tries += 1
        if not trace.was_killed:
            break
        number += int(stride)
    calls = Counter(trace.calls)
    sys.stdout.write(json.dumps({"calls": calls, "tries": tries, "wrong": wrong}) + "\n")


if __name__ == "__main__":
    main()
