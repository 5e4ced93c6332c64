"""Which package may import which: the layers of src/manyhands, and the layers inside of two packages.

tests/test_structure.py checks the imports against these tables. The diagram in docs/design.md is made from them.
"""

from __future__ import annotations

import re

LAYERS: dict[str, tuple[str, ...]] = {
    "errors; text for people": ("errors", "formatting"),
    "options; terminal output; intervals of steps; checks of given objects": (
        "options",
        "output",
        "intervals",
        "given_objects",
    ),
    "parts of a recipe: average; islands; streams; initial weights": ("average", "islands", "streams", "weights"),
    "parts of a recipe: validations": ("validation",),
    "settings; shards; environment; files; memory; workers": (
        "config",
        "shard_layout",
        "surroundings",
        "storage",
        "offload",
        "members",
    ),
    "what decides bits; TOML files": ("numerics", "documents"),
    "groups of workers; samples; what a model may contain; rounds of islands": ("comm", "data", "models", "rounds"),
    "optimizers on slices; data jobs; metrics of evaluations": ("optim", "prepare", "metrics"),
    "one training step; documents to tokens": ("engine", "corpus"),
    "persistent state; what a run writes and shows; predictions": ("checkpoint", "listeners", "planner"),
    "the loop; starting workers; diagnosis": ("training", "launching", "doctor"),
    "the command line": ("cli",),
    "`python -m manyhands`": ("__main__",),
}
"""Packages, and modules at the top, by what their layer is about, from the bottom up.

A file imports only from lower layers and from its own package.
"""

INNER_LAYERS: dict[str, list[list[str]]] = {
    package: [layer.split() for layer in order.split(" < ")]
    for package, order in (
        ("engine", "sharding agreement < units < step < update < assembly < evaluation full_state < step_engine"),
        (
            "prepare",
            "records < gridded < io < shuffle < plan < task < shards < engines < options < job < arguments < dataset",
        ),
    )
}
"""The layers inside of a package, from the bottom up. Its files import only from lower layers and from their own."""

DIAGRAM = re.compile(r"(?<=^```text\n)layers, from the top down\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)
"""The diagram in docs/design.md."""


def layer_diagram() -> str:
    """The layers as docs/design.md shows them, from the top down."""
    rows = [("  ".join(packages), about) for about, packages in reversed(LAYERS.items())]
    width = max(len(packages) for packages, _ in rows) + 2
    lines = ["layers, from the top down", *(f"  {packages:{width}}{about}" for packages, about in rows)]
    for package, layers in INNER_LAYERS.items():
        lines += ["", f"inside {package}, from the top down", *(f"  {'  '.join(parts)}" for parts in reversed(layers))]
    return "\n".join(lines) + "\n"
