"""A worker that trains until it is killed: python endless_worker.py FOLDER TRANSPORT.

Worker 0 creates FOLDER/began after three steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import manyhands as mh
from support.models import GPT_UNITS, gpt_recipe


def main(folder: Path, transport: str) -> None:
    with mh.Engine(gpt_recipe(), mh.Strategy(transport=transport, units=GPT_UNITS)) as engine:
        for batch in engine.batches():
            engine.step(batch)
            if engine.step_index == 3 and engine.group.rank == 0:
                (folder / "began").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
