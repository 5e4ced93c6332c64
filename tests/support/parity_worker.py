"""A worker of test_parity.py: trains the GPT in many ways and writes the digests.

    python parity_worker.py FOLDER GROUP JOBS.json

Every job creates its own engine and group. Each worker writes its results to FOLDER/worker-R.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import manyhands as mh
from manyhands.members import membership
from support.models import OWNED, gpt_recipe
from support.training import train_with_engine


def main(folder: Path, group: str, jobs: list[dict[str, Any]]) -> None:
    """Run the jobs. If PRETEND is set, every two workers behave as a separate host."""
    if "PRETEND" in os.environ:
        membership._host = lambda: f"host{int(os.environ['RANK']) // 2}"
    digests = {}
    for job in jobs:
        strategy = mh.Strategy(transport=group, stall_seconds=120, **job["strategy"] | {"units": tuple(job["units"])})
        changes = {"optimizer": OWNED[job["optimizer"]]} if job["optimizer"] else {}
        outcome = train_with_engine(
            gpt_recipe(job["precision"], device=job["device"], **changes),
            strategy,
            steps=job["steps"],
            load=Path(job["load"]) if job["load"] else None,
            save=Path(job["save"]) if job["save"] else None,
            save_at=job["save_at"],
        )
        digests[job["name"]] = outcome.digest
    (folder / f"worker-{os.environ['RANK']}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
