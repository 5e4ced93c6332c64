"""A job whose code has changed is another job: nothing of the old code is used. Comments don't matter."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

import manyhands as mh
from manyhands.prepare.plan.fingerprint import fingerprint_code
from support.changed_code import CASES, write_script

IDENTITIES = """
sys.stdout.write(json.dumps({
    name: mh.Dataset.from_records([1]).map(function).identity for name, function in functions.items()
}))
"""

JOB = """
word = "OLD"
functions.pop("replaced")  # workers import the module as it is in its file
functions.pop("evaluated")  # workers don't get what the text names
functions.pop("itemgetter")  # for other records

def every(number):
    if number == 2 and word == "O" "LD":
        os.kill(os.getppid(), signal.SIGKILL)
    return {name: str(function(number)) for name, function in functions.items()}

if __name__ == "__main__":
    read = mh.Dataset.read("numbers/*.jsonl")
    read.map(every).write("out", workers=1, progress=False)
    sys.stdout.write(json.dumps([every(number) for number in range(4)]))
"""


def moved(text: str) -> str:
    return "# A comment\n\n" + text.replace("\n", "  # another\n\n")


def changed(text: str) -> str:
    return text.replace("OLD", "NEW")


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The identity of each case's job: as it is, with the change, and only moved."""
    running = {}
    for name, change, how in (
        ("before", str, ["job.py"]),
        ("changed", changed, ["job.py"]),
        ("moved", moved, ["-m", "job"]),
    ):
        folder = tmp_path_factory.mktemp(name) / "lib" / "python" / "jobs"  # as in a home folder, and not installed
        write_script(folder, CASES, IDENTITIES, change)
        environment = {**os.environ, "PYTHONHASHSEED": str(len(name))}
        command = [sys.executable, *how]
        running[name] = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    return {name: json.loads(process.communicate(timeout=240)[0]) for name, process in running.items()}


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_changed_code_is_another_job(identities: dict[str, dict[str, str]], case: str) -> None:
    assert identities["changed"][case] != identities["before"][case]


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_comments_positions_and_processes_do_not_matter(identities: dict[str, dict[str, str]], case: str) -> None:
    assert identities["moved"][case] == identities["before"][case]


def test_a_job_that_was_killed_has_no_records_of_the_old_code(tmp_path: Path) -> None:
    (tmp_path / "numbers").mkdir()
    for number in range(4):
        (tmp_path / "numbers" / f"{number}.jsonl").write_text(f"{number}\n")

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "job.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)

    cases = [case for case in CASES if case.name != "pydantic"]  # which takes long to import
    write_script(tmp_path, cases, JOB)
    assert run().returncode == -signal.SIGKILL
    # Parts of the old code: the worker may complete the one in which it killed the job.
    assert len(list((tmp_path / "out" / ".manyhands").glob("*/*.done"))) in (2, 3)
    write_script(tmp_path, cases, JOB, changed)
    again = run()
    assert again.returncode == 0, again.stderr
    files = sorted((tmp_path / "out").glob("part-*"))
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert records == json.loads(again.stdout)
    assert len(records) == 4
    assert "OLD" not in str(records)
    assert str(records).count("NEW") > 4 * (len(cases) - 10)


def test_a_file_that_changes_after_its_import_is_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_while_loaded.py"
    file.write_text("def f(x):\n    return x + 1\n")
    function = importlib.import_module("edited_while_loaded").f
    before = fingerprint_code(function)
    file.write_text("# workers import this again\n\ndef f(x):\n    return x + 1\n")
    assert fingerprint_code(function) == before
    file.write_text("def f(x):\n    return x + 2\n")
    assert fingerprint_code(function) != before


def test_computed_names_without_a_file_are_refused() -> None:
    for definition, function in (
        ("", "lambda x: eval('x + 1')"),
        ("import importlib", "lambda x: importlib.import_module('j' + x)"),
        ("def f(x): return globals()['g'](x)", "lambda x: f(x)"),
        ("find = __import__", "lambda x: find(x)"),
        ("import sys", "lambda x: sys.modules[x].f(x)"),
    ):
        namespace: dict[str, Any] = {"__name__": "without_a_file"}
        exec(f"{definition}\nfunction = {function}", namespace)
        with pytest.raises(mh.ConfigError, match="uses code that its own code does not name"):
            fingerprint_code(namespace["function"])


def test_names_that_only_look_like_searches_are_not_refused() -> None:
    namespace: dict[str, Any] = {"__name__": "without_a_file"}
    exec(
        "import re, importlib\ndef f(x): return x.eval('a'), re.compile(x), importlib.import_module('json')", namespace
    )
    assert fingerprint_code(namespace["f"])


def test_functions_that_call_each_other_take_linear_time() -> None:
    seconds = []
    for count in (20, 200):
        namespace: dict[str, Any] = {"__name__": "without_a_file"}
        for number in range(count):
            calls = ", ".join(f"f{(number + step) % count}(x)" for step in (1, 3, 7))
            exec(f"def f{number}(x): return {calls}", namespace)
        started = time.process_time()
        before = fingerprint_code(namespace["f0"])
        seconds.append(time.process_time() - started)
        exec(f"def f{count - 1}(x): return 1", namespace)
        assert fingerprint_code(namespace["f0"]) != before
    assert seconds[1] < 100 * seconds[0]


def test_the_order_of_a_set_of_functions_does_not_matter() -> None:
    def made() -> Any:
        class Node:
            known: ClassVar[set[Any]] = set()

            def __init__(self, name: str) -> None:
                self.name = name
                self.known.add(self)

        nodes = [Node(str(number)) for number in range(20)]
        return nodes[0]

    assert len({fingerprint_code(made()) for _ in range(5)}) == 1


def test_a_graph_of_sets_is_refused_and_does_not_take_forever() -> None:
    class Node:
        def __init__(self) -> None:
            self.near: set[Node] = set()

    nodes = [Node() for _ in range(30)]
    for node in nodes:
        node.near |= set(nodes)
    with pytest.raises(mh.ConfigError, match="uses sets of objects that contain more sets"):
        fingerprint_code(nodes)


def test_a_function_may_close_over_an_arrow_table() -> None:
    def identity(value: int) -> str:
        table = pa.table({"a": [value]})
        return fingerprint_code(lambda row: table)

    assert identity(1) == identity(1) != identity(2)
