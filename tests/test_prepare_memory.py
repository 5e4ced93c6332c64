"""The memory that workers take stays within what they were given, however large the data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# In a small process of its own: what a process has had before exec counts as its children's peak.
PROGRAM = """
import resource, sys
import manyhands as mh
from manyhands.prepare.engines.local import close_persistent_pools
form, source = sys.argv[1:]
made = mh.Dataset.read(source + "/*.parquet")
made = made if form == "parquet" else made.map(lambda row: row)  # as Python objects
written = made.sort_by("k").write(source + "/out-" + form, format=form, workers=2, memory="700MiB", progress=False)
close_persistent_pools()  # children count when they have ended
print(written.records, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("form", "count"), [("parquet", 3_000_000), ("jsonl", 900_000)])
def test_sorting_stays_within_its_memory_limit(tmp_path: Path, form: str, count: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(3):
        key = generator.integers(0, 2**62, count // 3)
        table = pa.table({"k": key, "text": [f"{value:090d}" for value in key]})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=50_000)
    command = [sys.executable, "-c", PROGRAM, form, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    records, peak_kib = map(int, done.stdout.split())
    assert records == count
    assert 64 * 1024 < peak_kib < 350 * 1024


HOT = """
import resource, sys
import manyhands as mh
from manyhands.prepare.engines.local import close_persistent_pools
few = mh.Dataset.from_records([{"k": 1, "n": number} for number in range(3)])
many = mh.Dataset.read(sys.argv[1]).map(lambda line: {"k": 1, "text": line})
pairs = few.join(many, on="k").count(workers=1, memory="350MiB", progress=False)
close_persistent_pools()
print(pairs, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_a_key_whose_records_exceed_the_memory_is_joined_within_the_limit(tmp_path: Path) -> None:
    count = 600_000
    with (tmp_path / "many.txt").open("w") as file:
        file.writelines(f"{number:0300d}\n" for number in range(count))
    command = [sys.executable, "-c", HOT, str(tmp_path / "many.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    pairs, peak_kib = map(int, done.stdout.split())
    assert pairs == 3 * count
    assert 64 * 1024 < peak_kib < 350 * 1024
