"""The recorded digests: the cases, how each is run, and the table of their digests by machine.

A refactoring must not change a bit. The oracle can't show that, because it shares code with the engine (the order of
addition, seeds, the order of samples); the table can. Bits depend on torch and on the kind of CPU, so the table has a
part for each machine that recorded it. `make digests` adds the part of this machine, or replaces it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import manyhands as mh
from manyhands.numerics.arithmetic import numerics_identity
from support import island_runs, real_models
from support.models import GPT, GPT_UNITS, OWNED, conv_recipe, gpt_recipe, padded_recipe
from support.threads import run_threads
from support.training import Outcome, train_with_engine

TABLE = Path(__file__).resolve().parents[1] / "digests.json"
STEPS = 3
WAYS = [(sharding, workers) for sharding in ("ddp", "zero2", "zero3") for workers in (1, 3)]
UNCLIPPED = {"clip_norm": None, "schedule": None}
SEVEN = {"batch": mh.Batch(global_size=28, micro_size=2, virtual_workers=7), "model": partial(GPT, dropout=0.0)}
"""Seven virtual workers leave three subtrees, ((0+1)+(2+3)) + ((4+5)+6): the fewest whose order of merging matters."""

Digests = dict[str, str | None]
"""weights: the digest of the master weights. buffers: SHA-256 of the model's buffers; None if it has none."""

CASES: dict[str, Callable[[], mh.Recipe]] = {
    "gpt, dropout, clipped, fp32": gpt_recipe,
    "gpt, dropout, clipped, bf16": lambda: gpt_recipe("bf16"),
    "gpt, dropout, fp32": lambda: gpt_recipe(**UNCLIPPED),
    "gpt, no dropout, seven virtual workers, fp32": lambda: gpt_recipe(**SEVEN),
    "gpt, no dropout, seven virtual workers, bf16": lambda: gpt_recipe("bf16", **SEVEN),
    "gpt, unequal weights, fp32": padded_recipe,
    "gpt, unequal weights, bf16": lambda: padded_recipe("bf16"),
    "gpt, Muon and AdamW, fp32": lambda: gpt_recipe(optimizer=OWNED["Muon and AdamW"]),
    "gpt, Muon and AdamW, bf16": lambda: gpt_recipe("bf16", optimizer=OWNED["Muon and AdamW"]),
    "convolutions, batch norm, fp32": conv_recipe,
    "resnet, batch norm, fp32": lambda: real_models.resnet("fp32"),
    "resnet, batch norm, bf16": lambda: real_models.resnet("bf16"),
    "gpt2 of transformers, fp32": lambda: real_models.gpt2("fp32"),
    "llama, LoRA, fp32": lambda: real_models.lora("fp32"),
    "llama, LoRA on bf16": lambda: real_models.lora_on_bf16("bf16"),
}


def machine() -> str:
    """What the bits depend on besides the recipe: torch, the kind of CPU and its instructions."""
    cpu = torch.device("cpu")
    identity = numerics_identity(cpu, 1, cpu)
    described = [
        re.search(rf"^{name}\s*:\s*(.+)$", _cpu_info(), re.MULTILINE) for name in ("model name", "cpu family", "model")
    ]
    name, family, model = (found[1] if found else "?" for found in described)
    parts = (f"{name} (family {family}, model {model})", identity["cpu_kernels"], f"bf16 {identity['cpu_bf16']}")
    return ", ".join((f"torch {identity['torch']}", *parts))


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else f"model name: {platform.processor() or platform.machine()}"


def digests_of(outcome: Outcome) -> Digests:
    """The two digests of a run."""
    sha = hashlib.sha256()
    for name, buffer in outcome.buffers.items():
        sha.update(f"{name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
        sha.update(buffer.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"weights": outcome.weights, "buffers": sha.hexdigest() if outcome.buffers else None}


def run_case(name: str, ways: Sequence[tuple[str, int]] = WAYS) -> Iterator[tuple[str, Digests]]:
    """Train a case in several ways (sharding, workers); yield the way and the digests of each worker."""
    recipe = CASES[name]()
    units = GPT_UNITS if name.startswith("gpt,") else ()
    for sharding, workers in ways:
        strategy = mh.Strategy(sharding=sharding, units=units)
        outcomes = run_threads(
            workers, lambda group, by=strategy: train_with_engine(recipe, by, steps=STEPS, group=group)
        )
        for rank, outcome in enumerate(outcomes):
            yield f"{sharding}, worker {rank} of {workers}", digests_of(outcome)


def of_islands() -> dict[str, Digests]:
    """The digests of runs with islands, which cover weights and buffers together."""
    digests = island_runs.digests_of_cases("zero2")
    return {f"islands, {name}": {"weights": digest, "buffers": None} for name, digest in digests.items()}


def read_table() -> dict[str, dict[str, Digests]]:
    """By machine, then by case."""
    table: dict[str, dict[str, Digests]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return table


def record() -> None:
    """Run all cases and write this machine's part of the table."""
    found = {name: dict(run_case(name)) for name in CASES}
    for name, ways in found.items():
        if len({json.dumps(digests) for digests in ways.values()}) > 1:
            raise SystemExit(f"{name}: the digests depend on the workers: {ways}")
    mine = {name: next(iter(ways.values())) for name, ways in found.items()}
    table = {**read_table(), machine(): mine | of_islands()}
    TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=2) + "\n")


if __name__ == "__main__":
    record()
