"""`manyhands doctor`: what it finds on a machine, what machines have in common, and what it tells of a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.doctor import machines as machine
from manyhands.doctor.machines import Finding, _numerics, check_machine
from manyhands.doctor.runs import run_history
from manyhands.listeners.run_directory import RunDirectory
from manyhands.members.processes import oom_kills
from manyhands.storage.run_lock import run_lock
from support.models import gpt_recipe
from test_faults import MANYHANDS

MAIN = str(Path(machine.__file__).parents[1] / "cli" / "main.py")


def verdicts(folder: Path) -> dict[str, Finding]:
    return {finding.subject: finding for finding in check_machine(folder)}


def test_this_machine_meets_the_requirements_of_workers(tmp_path: Path) -> None:
    found = verdicts(tmp_path / "runs")
    for subject in ("versions", "shared memory", "watching", "ports", "GPUs"):
        assert found[subject].verdict == "good", found[subject]
    assert found["disk"].verdict != "bad"
    assert str(tmp_path) in found["disk"].message
    assert not (tmp_path / "runs").exists()


def test_problems_are_reported_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 100 << 20)
    monkeypatch.setattr(machine, "_CHILD", "raise PermissionError('no')")
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 0.5)
    monkeypatch.setattr(os, "pidfd_open", lambda pid: (_ for _ in ()).throw(PermissionError("seccomp")))
    monkeypatch.setattr(machine, "LEAST_DISK_BYTES", 1 << 60)
    found = verdicts(tmp_path)
    for subject in ("memory", "shared memory", "watching", "disk"):
        assert found[subject].verdict == "bad", found[subject]
        assert found[subject].hint
    assert "PermissionError: no" in found["shared memory"].message
    assert "0.5 by its control group" in found["CPUs"].message


def test_hosts_with_other_numerics_are_named() -> None:
    same, other = {"torch": "2.14"}, {"torch": "2.13"}
    assert _numerics([("a", same), ("b", same)]).verdict == "good"
    finding = _numerics([("a", same), ("b", other)])
    assert finding.verdict == "bad"
    assert "torch: 2.14 on a, 2.13 on b" in finding.message


@pytest.mark.slow
def test_under_a_launcher_all_hosts_are_checked_together(tmp_path: Path) -> None:
    command = [*MANYHANDS, "run", "--workers", "2", MAIN, "doctor", "--json", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    found = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert {"numerics", "clocks", "links"} <= set(found), done
    assert "2 workers" in found["numerics"]["message"]


def run_of(folder: Path, *events: tuple[str, dict[str, object]]) -> RunDirectory:
    run = RunDirectory(folder)
    run.write_manifest({}, {})
    for event, facts in events:
        run.append_event(event, **facts)
    return run


STARTED = ("started", {"step": 0, "source": None, "repeats": 0, "workers": 2, "sharding": "zero2"})
FAILED = {"rank": 1, "what": "worker 1 was killed by SIGKILL", "where": "step 3 / update", "hint": "use fewer workers"}


def test_a_run_that_failed_for_good(tmp_path: Path) -> None:
    again = ("started", {"step": 2, "source": "snapshot", "repeats": 1, "workers": 2, "sharding": "zero2"})
    run = run_of(
        tmp_path / "run", STARTED, ("failed", {**FAILED, "restart": 1}), again, ("failed", {**FAILED, "restart": None})
    )
    run.log(1).write_text("one\nout of cheese\n")
    history = run_history(run)
    assert history.outcome == "failed"
    assert "worker 1 was killed by SIGKILL" in history.summary
    texts = [text for _, text in history.lines]
    assert "step 3 / update" in texts[1]
    assert "restarted (1)" in texts[1]
    assert texts[0] == "started: 2 workers, zero2"
    assert texts[2] == "started after step 2 from a snapshot in memory: 2 workers, zero2, 1 steps repeated"
    assert history.tails == {"worker-1.log": "one\nout of cheese"}
    assert "starts from the beginning" in history.advice


def test_an_old_failure_is_not_reported_about_a_later_good_run(tmp_path: Path) -> None:
    again = ("started", {"step": 2, "source": "snapshot", "repeats": 1, "workers": 2, "sharding": "zero2"})
    for last in (("stopped", {"step": 5}), ("ended", {"step": 9, "digest": "d"})):
        run = run_of(tmp_path / last[0], STARTED, ("failed", {**FAILED, "restart": 1}), again, last)
        run.log(1).parent.mkdir(exist_ok=True)
        run.log(1).write_text("out of cheese\n")
        history = run_history(run)
        assert history.outcome == last[0]
        assert (history.tails, FAILED["hint"] in history.advice) == ({}, False)
        assert "worker 1 was killed" in history.lines[1][1]


def test_processes_that_the_kernel_killed_for_lack_of_memory_are_counted(tmp_path: Path) -> None:
    kills = oom_kills()
    if kills is None:
        pytest.skip("this kernel counts no such kills")
    here = {"host": socket.gethostname(), "oom_kills": kills - 1}
    started = ("started", {**STARTED[1], **here})
    killed = run_of(tmp_path / "killed", started)
    with run_lock(killed.path):
        pass
    history = run_history(killed)
    assert history.outcome == "killed"
    assert "the kernel of this host has killed a process because memory ran out" in history.summary
    failed = run_of(tmp_path / "failed", started, ("failed", {**FAILED, "restart": None, "oom_kills": kills + 2}))
    assert "has killed 3 processes because memory ran out" in run_history(failed).summary
    ended = run_of(tmp_path / "ended", started, ("ended", {"step": 9, "digest": "d"}))
    assert "memory" not in run_history(ended).summary
    elsewhere = run_of(tmp_path / "elsewhere", ("started", {**STARTED[1], **here, "host": "another"}))
    assert "memory" not in run_history(elsewhere).summary


@pytest.mark.parametrize(("age", "outcome"), [(0.0, "perhaps running"), (600.0, "perhaps running"), (3600.0, "killed")])
def test_a_run_that_recorded_no_end(tmp_path: Path, age: float, outcome: str) -> None:
    run = run_of(tmp_path / "run", STARTED)
    os.utime(run.path / "events.jsonl", (time.time() - age,) * 2)
    assert run_history(run).outcome == outcome


def test_a_run_whose_launcher_lives_is_running_however_long_it_records_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", STARTED)
    with run_lock(run.path):
        os.utime(run.path / "events.jsonl", (time.time() - 3600,) * 2)
        history = run_history(run)
        assert history.outcome == "running"
        assert "wait" in history.advice
        assert "the same command" not in history.advice
    os.utime(run.path / "events.jsonl")
    assert run_history(run).outcome == "killed"
    (run.path / ".lock").write_text('["another host", 1]')  # locks of another host may be invisible here
    history = run_history(run)
    assert history.outcome == "perhaps running"
    assert "wait" in history.advice


def test_checkpoints_are_found_outside_of_the_run_directory(tmp_path: Path) -> None:
    run, elsewhere = RunDirectory(tmp_path / "run"), tmp_path / "elsewhere"
    mh.train(gpt_recipe(), steps=1, run_dir=run.path, checkpoint_dir=elsewhere, show=False)
    run.append_event("failed", **FAILED, restart=None)
    assert "continues after step 1" in run_history(run).advice
    run.write_manifest({}, {}, checkpoints="nosuchstore://bucket/folder")
    assert "can't be listed from here" in run_history(run).advice


def test_a_run_that_ended(tmp_path: Path) -> None:
    history = run_history(run_of(tmp_path / "run", STARTED, ("ended", {"step": 5, "digest": "abc"})))
    assert (history.outcome, history.advice) == ("ended", "nothing to do")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", STARTED, ("failed", {**FAILED, "restart": None}))
    (run.checkpoints / "step-00000002").mkdir()
    assert f"remove {run.checkpoints / 'step-00000002'}" in run_history(run).advice


def test_on_the_command_line(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", STARTED, ("failed", {**FAILED, "restart": None}))
    done = subprocess.run(
        [*MANYHANDS, "doctor", str(run.path)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 1
    assert "it failed after 0 steps: worker 1 was killed by SIGKILL" in done.stdout
    assert "what to do: use fewer workers" not in done.stdout  # without a checkpoint it only starts from the beginning
