"""The memory that workers take stays within what they were given, however large the data."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import manyhands as mh

MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_sorting_takes_no_more_memory_than_it_may(tmp_path: Path, form: str) -> None:
    generator = np.random.default_rng(0)
    count = 3_000_000 if form == "parquet" else 1_000_000
    for number in range(3):
        key = generator.integers(0, 2**62, count // 3)
        table = pa.table({"k": key, "text": [f"{value:090d}" for value in key]})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=50_000)
    made = mh.Dataset.read(str(tmp_path / "*.parquet"))
    made = made if form == "parquet" else made.map(lambda row: row)  # as Python objects
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    written = made.sort_by("k").write(str(tmp_path / "out"), format=form, workers=2, memory=700 * MIB)
    assert written.records == count
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    assert peak_mib > before / 1024
    assert peak_mib < 350
