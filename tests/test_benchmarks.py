"""A benchmark that is stopped or killed leaves no contender and no worker running."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyhands.members.processes import has_ended

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

DRIVER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import contenders
contenders.stop_on_signals()
launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
contenders.run([*launcher, sys.argv[2], sys.argv[3]], dict(os.environ), 600)
"""

WORKER = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], f"{os.getpid()}-{os.getppid()}").touch()
time.sleep(600)
"""


def test_benchmarks_and_examples_import_names_that_exist() -> None:
    paths = [path for folder in ("benchmarks", "examples") for path in (BENCHMARKS.parent / folder).rglob("*.py")]
    imports = [
        (path.name, node.module, name.name)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("manyhands")
        for name in node.names
    ]
    assert len(imports) > 20
    assert not [each for each in imports if not exists(each[1], each[2])]


def exists(module: str | None, name: str) -> bool:
    """Return whether `from module import name` works."""
    imported = importlib.import_module(module or "")
    is_package = hasattr(imported, "__path__")
    return hasattr(imported, name) or (is_package and importlib.util.find_spec(f"{module}.{name}") is not None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_stopped_benchmark_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "pids").mkdir()
    command = [sys.executable, "-c", DRIVER, str(BENCHMARKS), str(tmp_path / "worker.py"), str(tmp_path / "pids")]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(found := list((tmp_path / "pids").iterdir())) < 2:
        assert driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, number)
    assert driver.wait(60) != 0
    pids = {int(pid) for path in found for pid in path.name.split("-")}
    deadline = time.monotonic() + 60
    while not all(map(has_ended, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)
