"""A worker of test_real_models.py: trains one model and writes its digest to FOLDER/worker-R.json.

python real_model_worker.py FOLDER GROUP STAGE MODEL
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import manyhands as mh
from support.real_models import RECIPES
from support.training import train_with_engine

if __name__ == "__main__":
    folder, group, sharding, name = sys.argv[1:]
    strategy = mh.Strategy(transport=group, sharding=sharding, stall_seconds=60)
    outcome = train_with_engine(RECIPES[name]("bf16"), strategy, steps=2)
    (Path(folder) / f"worker-{os.environ['RANK']}.json").write_text(json.dumps(outcome.digest))
