"""Clusters on simulated hosts that see nothing but the store: one digest for any number of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support import island_clusters, s3
from support.hosts import hosts
from test_hosts import needs_hosts

CASES: list[dict[str, Any]] = [
    {"islands": {"bits": 32, "every": 5}, "muon": True},
    {"islands": {"bits": 8, "every": 4, "delay": 1, "momentum_from": 0, "outer": "nesterov"}},
    {"islands": {"bits": 4, "every": 5, "delay": 2, "momentum_from": 10, "outer": "nesterov", "compress": True}},
    {"islands": {"bits": 2, "every": 4}, "muon": True},
    {"islands": {"bits": 4, "every": 3, "inner_state": "reset"}},
]
"""The recipe of all has dropout and batch norm."""

COUNT = 4
SCRIPT = """
import json, sys, time
from support import island_clusters, s3
while True:
    try:
        s3.create_bucket(sys.argv[2])
        break
    except OSError:
        time.sleep(0.1)
print(json.dumps([island_clusters.digest_of(spec) for spec in json.loads(sys.argv[1])]))
"""


def spec_of(folder: Path, case: int, clusters: int, number: int) -> dict[str, Any]:
    """Return what one of several clusters trains. Of two cases one is in a folder, and the other in the store."""
    is_on_s3 = (case + clusters) % 2 == 0
    place = f"s3://{s3.BUCKET}/{case}-{clusters}" if is_on_s3 else str(folder / f"store-{case}-{clusters}")
    islands = [island for island in range(COUNT) if island % clusters == number]
    return {
        **CASES[case],
        "islands": {"count": COUNT, **CASES[case]["islands"]},
        "workers": 2 if (case + number) % 4 == 0 else 1,
        "strategy": {"sharding": ("ddp", "zero1", "zero2", "zero3")[(case + clusters + number) % 4]},
        "options": {
            "islands_at": place,
            "islands": islands,
            "run_dir": str(folder / f"run-{case}-{clusters}-{number}"),
        },
    }


@needs_hosts
@pytest.mark.slow
def test_any_number_of_clusters_ends_with_one_digest(tmp_path: Path) -> None:
    expected = []
    for case in CASES:
        islands = {"count": COUNT, **case["islands"]}
        expected.append(island_clusters.digest_of({**case, "islands": islands, "workers": 1, "options": {}}))
    order = [(case, clusters) for case in range(len(CASES)) for clusters in (1, 2, 3, 4)]
    with hosts(COUNT + 1) as (*found, server):
        url = f"http://{server.address}:5000"
        server.start(s3.server_command(server.address, 5000))
        environment = {**s3.VARIABLES, "AWS_ENDPOINT_URL": url, "PYTHONPATH": ":".join(sys.path)}
        running = []
        for number, host in enumerate(found):
            specs = [spec_of(tmp_path, case, clusters, number) for case, clusters in order if number < clusters]
            command = [sys.executable, "-c", SCRIPT, json.dumps(specs), url]
            running.append(host.start(command, tmp_path / host.name, environment))
        codes = [process.wait(900) for process in running]
        outputs = [(tmp_path / host.name).read_text() for host in found]
    assert codes == [0] * COUNT, "\n".join(outputs)
    for number, output in enumerate(outputs):
        mine = [expected[case] for case, clusters in order if number < clusters]
        assert json.loads(output.splitlines()[-1]) == mine
