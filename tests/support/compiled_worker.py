"""A worker of test_compile.py: trains the compiled model in some ways, one after the other, and writes the digests.

python compiled_worker.py FOLDER PRECISION;... WAY;...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import manyhands as mh
from support.compiled_models import UNITS, compiled_recipe
from support.training import train_with_engine

WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"sharding": "ddp"},
    "zero2": {"sharding": "zero2"},
    "zero2, process": {"sharding": "zero2", "transport": "distributed"},
    "zero3": {"sharding": "zero3"},
    "zero3, process": {"sharding": "zero3", "transport": "distributed"},
    "units inside of what is compiled": {"sharding": "zero3", "transport": "distributed", "units": ("blocks.0.mix",)},
    "computed twice": {"sharding": "zero3", "transport": "distributed", "activation_checkpointing": ("blocks.*",)},
    "no overlap": {"sharding": "zero1", "overlap": False},
}
STEPS = 3


def main(folder: Path, precisions: list[str], ways: list[str]) -> None:
    digests = {}
    for precision in precisions:
        for way in ways:
            strategy = mh.Strategy(**({"units": UNITS} | WAYS[way]))
            outcome = train_with_engine(compiled_recipe(precision), strategy, steps=STEPS)
            digests[f"{way}, {precision}"] = outcome.digest
    (folder / f"worker-{os.environ['RANK']}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(";"), sys.argv[3].split(";"))
