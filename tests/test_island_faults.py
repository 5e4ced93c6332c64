"""Clusters that are late, lost or restarted, and damage in the store: the digest stays, or an error names the cause."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
import torch

import manyhands as mh
from manyhands.comm.local import LocalGroup
from manyhands.listeners.run_directory import RunDirectory
from manyhands.rounds.leases import _Announcement, _write
from manyhands.rounds.store import RoundStore
from manyhands.training.island_states import _FILE, IslandStates
from manyhands.training.on_first import FirstWorker
from support.island_runs import CASES, digest_of
from support.processes import suspend

CASE = "momentum and delay"
ALL = [0, 1, 2]


@cache
def expected(steps: int = 14) -> str:
    """The digest of one process."""
    return digest_of(CASES[CASE], steps=steps)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the rounds of a finished run of 4 rounds, and states after round 2."""
    folder = tmp_path_factory.mktemp("finished")
    assert digest_of(CASES[CASE], folder / "run", islands_at=str(folder / "store"), islands=ALL) == expected()
    assert sorted(path.name for path in (folder / "store" / "states").glob("*/*/step-*")) == ["step-00000008"] * 3
    return folder / "store"


def copied(store: Path, folder: Path) -> str:
    """Return a copy of the store."""
    return str(shutil.copytree(store, folder / "store"))


def command(folder: Path, store: str, steps: int = 14, islands: str = "auto") -> list[str]:
    """Return a command of a cluster in a process of its own. It prints its digest."""
    script = (
        "import json, sys, support.island_runs as r; given = sys.argv[5]; islands = given if given == 'auto' else "
        "json.loads(given); print(r.digest_of(r.CASES[sys.argv[1]], sys.argv[2], steps=int(sys.argv[4]), "
        "islands_at=sys.argv[3], islands=islands))"
    )
    return [sys.executable, "-c", script, CASE, str(folder), store, str(steps), islands]


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_damaged_file_in_the_store_is_named_and_may_be_replaced(finished: Path, tmp_path: Path) -> None:
    store = copied(finished, tmp_path)
    path = Path(store, "rounds", "00000003", "island-1.safetensors")
    right = path.read_bytes()
    for damaged in (
        right[:-1] + bytes([right[-1] ^ 1]),
        right[:100],
        path.with_name("island-2.safetensors").read_bytes(),
    ):
        path.write_bytes(damaged)
        with pytest.raises(mh.CheckpointError) as caught:
            digest_of(CASES[CASE], tmp_path / "late", islands_at=store, islands=[0])
        assert caught.value.where == str(path)
    path.write_bytes(right)
    assert digest_of(CASES[CASE], tmp_path / "late", islands_at=store, islands=[0]) == expected()


def test_a_checkpoint_of_a_cluster_without_islands_has_the_state_of_none(finished: Path, tmp_path: Path) -> None:
    store, run = copied(finished, tmp_path), tmp_path / "run"
    busy = _Announcement("session", 1, "host", "computing all islands", ALL)
    _write(RoundStore(Path(store), print), "clusters/0123456789abcdef.json", vars(busy))
    assert digest_of(CASES[CASE], run, islands_at=store, islands="auto", checkpoint_every=1) == expected()
    assert RunDirectory(run).read_metrics() == [], "it should have found a live cluster that has all islands"
    shutil.rmtree(run / "checkpoints" / "step-00000014")  # as if it was killed after round 3
    partial = [run / "islands" / "at-rest" / "island-1", *Path(store, "states").glob("island-2/*")]
    identity = RunDirectory(run).read_manifest()["id"]
    partial = [partial[0], Path(store, "states", "island-2", identity)]
    for root in partial:
        (root / ".step-00000012.0123456789abcdef.partial").mkdir(parents=True)
    # Its files are compared with those in the store.
    assert digest_of(CASES[CASE], run, islands_at=store, islands=ALL) == expected()
    assert not [path for root in (run, Path(store)) for path in root.rglob("*.partial")]
    assert not list((run / "islands" / "rounds").glob("*"))


@pytest.mark.slow
def test_a_cluster_whose_rounds_were_deleted_continues_after_a_later_one(tmp_path: Path) -> None:
    store, steps = str(tmp_path / "store"), 34
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen(command(tmp_path / "late", store, steps, "[0]"), **pipes) as late:  # type: ignore[call-overload]
        try:
            while not (tmp_path / "late" / "islands" / "start" / "step-00000000").exists():
                assert late.poll() is None
                time.sleep(0.01)
            suspend(late)
            assert digest_of(CASES[CASE], tmp_path / "run", steps=steps, islands_at=store) == expected(steps)
            assert not Path(store, "rounds", "00000001").exists(), "the run is too short to delete rounds"
            late.send_signal(signal.SIGCONT)
            output, _ = late.communicate(timeout=120)
        finally:
            late.kill()
    assert output.strip() == expected(steps)


def test_states_of_gone_clusters_are_deleted_with_the_rounds_they_need(finished: Path, tmp_path: Path) -> None:
    location = Path(copied(finished, tmp_path))
    given = CASES[CASE]
    roots = [location / "states" / f"island-{island}" for island in range(3)]
    for root in roots:
        (newest,) = root.glob("*/step-00000008")
        shutil.copytree(newest, root / "gone" / "step-00000004")
    rounds = mh.Islands(**given).rounds(14, pretrained=False)
    with closing(FirstWorker(LocalGroup(torch.device("cpu")), lambda: False)) as first:
        states = IslandStates(tmp_path, RoundStore(location, print), first, rounds, "mine", shares_start=False)
        states.prune(3, before=2)
        assert all((root / "gone" / "step-00000004").exists() for root in roots)
        states.prune(3, before=3)
    left = [path.name for root in roots for path in root.glob("*/*step-*")]
    assert left == ["step-00000008"] * 3


def test_a_failed_upload_ends_a_run_that_waits_for_others(finished: Path, tmp_path: Path) -> None:
    store = copied(finished, tmp_path)
    for folder in ("rounds", "states"):
        shutil.rmtree(Path(store, folder))
    Path(store, "rounds").mkdir()
    Path(store, "rounds", "00000001").symlink_to(tmp_path)  # nothing is written through it
    done = subprocess.run(
        command(tmp_path / "run", store, islands="[0]"), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert "a folder in the islands' store is a link" in done.stderr


def test_a_folder_that_is_gone_for_a_while_is_waited_for(finished: Path, tmp_path: Path) -> None:
    root = Path(copied(finished, tmp_path))
    store, asked, found = RoundStore(root, print), threading.Event(), []

    def fetch() -> None:
        found.append(store.fetch(3, 1, tmp_path))

    original = store.check_mounted

    def check() -> None:
        try:
            original()
        finally:
            if not root.exists():
                asked.set()

    store.check_mounted = check  # type: ignore[method-assign]
    original_name = store._name

    def name(round: int, island: int) -> str:
        listed = original_name(round, island)
        root.rename(tmp_path / "away")  # between the listing and the copy
        return listed

    store._name = name  # type: ignore[method-assign]
    thread = threading.Thread(target=fetch)
    thread.start()
    assert asked.wait(60)
    (tmp_path / "away").rename(root)
    thread.join(60)
    assert [path.name for path in found] == ["island-1.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        "step-00000010/../../../evil.py",
        "step-00000010/0123456789abcdef/../../evil.py",
        "frozen-0123456789abcdef/../evil.py",
        "step-00000010/parts.py",
        "step-00000010/worker-0.safetensors\n",
        "../step-00000010/manifest.json",
    ],
)
def test_files_of_others_cannot_lead_out_of_a_clusters_folder(name: str) -> None:
    assert _FILE.fullmatch(name) is None
    assert _FILE.fullmatch("step-00000010/0123456789abcdef/worker-0.safetensors") is not None


def test_a_restarted_cluster_waits_for_a_folder_that_is_not_mounted(finished: Path, tmp_path: Path) -> None:
    store, away = Path(copied(finished, tmp_path)), tmp_path / "away"
    assert digest_of(CASES[CASE], tmp_path / "run", islands_at=str(store), islands=[0]) == expected()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "events.jsonl").unlink()
    store.rename(away)
    store.mkdir()  # the mount point
    again = command(tmp_path / "run", str(store), islands="[0]")
    with subprocess.Popen(again, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as run:
        try:
            while not (tmp_path / "run" / "events.jsonl").exists():  # it opens the place right after this
                assert run.poll() is None
                time.sleep(0.05)
            with pytest.raises(subprocess.TimeoutExpired):
                run.wait(3)
            assert os.listdir(store) == []
            store.rmdir()
            away.rename(store)
            output, _ = run.communicate(timeout=120)
        finally:
            run.kill()
    assert output.strip() == expected()
