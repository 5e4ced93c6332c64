"""`manyhands train --hosts` and `manyhands join`: hosts come and go, and the run ends in one worker's bits."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import (  # type: ignore[attr-defined]
    DistNetworkError,
    DistStoreError,
    HashStore,
    PrefixStore,
    TCPStore,
)
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

from manyhands.errors import ConfigError, Interrupted, WorkerError
from manyhands.launching import rendezvous as far_store
from manyhands.launching import rendezvous as rendezvous
from manyhands.launching.failures import explain_failure
from manyhands.launching.launcher import behind, run_workers
from manyhands.launching.rendezvous import (
    PORT,
    HostsRendezvousHandler,
    RemoteStore,
    Rendezvous,
    interface_of,
    own_address,
    parse_endpoint,
)
from manyhands.launching.supervision import Stop
from manyhands.members.reports import Failure, WorkerEnd
from support.hosts import Host, hosts
from support.processes import hold, started
from test_faults import MANYHANDS, SUPPORT
from test_hosts import ENVIRONMENT, LOST_SECONDS, Job, events, needs_hosts

RECIPE = str(SUPPORT / "faulty.toml")


def test_an_endpoint_has_a_port_of_its_own_or_the_usual_one() -> None:
    assert parse_endpoint("first") == ("first", PORT)
    assert parse_endpoint("10.0.0.1:4000") == ("10.0.0.1", 4000)
    for wrong in ("", ":1", "first:", "first:x", "first:99999"):
        with pytest.raises(ConfigError, match="an endpoint can't be understood"):
            parse_endpoint(wrong)


def test_the_way_to_a_host_is_known_before_anything_is_sent() -> None:
    assert own_address("127.0.0.1", PORT) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
    with pytest.raises(ConfigError, match="a host can't be reached"):
        own_address("no-such-host.invalid", PORT)


def test_where_there_is_no_run_nobody_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_REACH_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="no run can be joined there") as caught:
        rendezvous.join_hosts("127.0.0.1:9")
    assert caught.value.where == "127.0.0.1:9"


def test_a_culprit_on_another_host_is_named_by_those_who_noticed() -> None:
    lost = WorkerError("worker 2's host has not been heard of for 10 s", rank=2, where="worker 2 (pid 7 on b), step 4")
    ends = [WorkerEnd(rank=0, exit_code=1, seconds=5.0, failure=Failure.of(lost, rank=0, pid=1))]
    found = explain_failure(ends)
    assert isinstance(found, WorkerError)
    assert (found.rank, found.what, found.where) == (2, lost.what, lost.where)


def test_workers_that_all_stopped_as_asked_have_not_failed() -> None:
    stopped = Failure.of(Interrupted("stopped after step 3, as asked"), rank=0, pid=1)
    assert isinstance(explain_failure([WorkerEnd(rank=0, exit_code=1, seconds=5.0, failure=stopped)]), Interrupted)


def left(*errors: Exception) -> list[WorkerEnd]:
    """By the workers of a host whose launcher didn't learn how they ended."""
    accounts = [Failure.of(error, rank=rank, pid=1) for rank, error in enumerate(errors)]
    return [WorkerEnd(rank=each.rank, exit_code=0, seconds=5.0, failure=each) for each in accounts]


def test_what_ended_the_run_is_said_where_the_hosts_only_do_not_meet_again() -> None:
    """On the host that raised, and on the others, which noticed."""
    apart = WorkerError("the hosts don't find together (any more)", where="first:1")
    elsewhere = WorkerError("worker 2 raised ValueError: no cheese", rank=2, where="worker 2 (pid 7 on b), step 4")
    gone = WorkerError("a worker failed, and the store with its story is gone")
    stopped = Interrupted("stopped after step 3, as asked")
    for ends, rank, what in (
        (left(elsewhere, elsewhere), 2, elsewhere.what),
        (left(gone, ValueError("no cheese")), 1, "worker 1 failed: ValueError: no cheese"),
    ):
        said = behind(apart, ends)
        assert isinstance(said, WorkerError)
        assert (said.rank, said.what) == (rank, what)
        assert apart.what in str(said)
    assert behind(apart, left(gone)) is apart
    assert behind(apart, []) is apart
    assert behind(apart, left(stopped, stopped)).what == stopped.what


def alone(port: int, restarts: int = 1) -> Rendezvous:
    """Of a run on several hosts, of which there is one."""
    return Rendezvous(
        host="127.0.0.1", port=port, run=f"run-{port}", least=1, most=1, restarts=restarts, first=True, said={}
    )


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match="the hosts can't meet at this port") as caught:
            run_workers([sys.executable, "-c", ""], workers=1, rendezvous=alone(port))
    assert caught.value.where == f"127.0.0.1:{port}"
    assert "Address already in use" in str(caught.value.got)


def test_a_stop_is_heard_while_hosts_gather_by_the_thread_that_waits_alone(tmp_path: Path) -> None:
    """And not by torch's, which says meanwhile that this host lives: it would end."""
    stop, closed = Stop(tmp_path, 1, 1.0), []
    heartbeats: list[BaseException | None] = []

    class Handler:
        def next_rendezvous(self) -> RendezvousInfo:
            stop.signal = signal.SIGTERM
            with ThreadPoolExecutor(1) as other:
                heartbeats.append(other.submit(rendezvous._look).exception())
            store = RemoteStore(HashStore(), rendezvous._look)
            info = RendezvousStoreInfo("127.0.0.1", 1)
            return RendezvousInfo(store, 0, 2, info)  # of two hosts, and the other one doesn't come

        def set_closed(self) -> None:
            rendezvous._look()  # torch asks the store
            closed.append(True)

    rendezvous = HostsRendezvousHandler.__new__(HostsRendezvousHandler)
    agent = threading.get_ident()
    rendezvous.__dict__.update(_stop=stop, _handler=Handler(), _first=True, _agent=agent)
    began = time.monotonic()
    with pytest.raises(SignalException):
        rendezvous.next_rendezvous()
    assert time.monotonic() - began < 5
    assert (heartbeats, closed) == ([None], [True])


KEEPS_A_STORE = """
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped: the connection lives. Also behind torch's stores with a prefix."""
    monkeypatch.setattr(far_store, "ANSWER_SECONDS", 1.0)
    with started([sys.executable, "-c", KEEPS_A_STORE]) as keeper:
        assert keeper.stdout is not None
        intra_host = TCPStore("127.0.0.1", int(keeper.stdout.readline()), is_master=False)
        looks: list[int] = []
        inter_host = RemoteStore(intra_host, lambda: looks.append(1))
        store = PrefixStore("round", PrefixStore("run", inter_host))
        store.multi_set(["a", "b"], ["1", "2"])
        assert store.multi_get(["a", "b"]) == [b"1", b"2"]
        assert (store.add("n", 2), store.compare_set("a", "1", "3"), store.get("a")) == (2, b"3", b"3")
        with pytest.raises(DistStoreError, match=r"nobody has set .*c within 0\.1 s"):
            store.wait(["c"], timedelta(seconds=0.1))
        hold(keeper)
        looks.clear()
        with pytest.raises(DistNetworkError, match="the first host has not answered for 1 s"):
            store.check(["a"])
        assert len(looks) > 5
        looks.clear()
        with pytest.raises(DistNetworkError):  # it's not asked again
            store.set("a", "4")
        assert len(looks) == 1


LEAVES_A_CHILD = """
import os, subprocess, sys
from pathlib import Path
told = Path(sys.argv[1])
if told.exists():
    status = Path("/proc") / told.read_text() / "status"
    sys.exit(7 if status.exists() and "State:\\tZ" not in status.read_text() else 0)
told.write_text(str(subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL).pid))
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_worker_has_started_is_gone_when_workers_are_started_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", LEAVES_A_CHILD, str(tmp_path / "pid")]
    run_workers(command, workers=1, rendezvous=alone(port))
    assert (tmp_path / "pid").exists()


def until(come: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def can_be_reached(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), 1.0):
        return True
    return False


def test_who_waits_for_other_hosts_can_be_stopped(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    waits = [
        "train",
        RECIPE,
        "--workers",
        "1",
        "--hosts",
        "2",
        "--rendezvous",
        endpoint,
        "--run-dir",
        str(tmp_path / "run"),
    ]
    with started([*MANYHANDS, *waits]) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"others join this run with: manyhands join {endpoint}\n"
        until(lambda: can_be_reached(endpoint))  # by then it listens to signals, too
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().startswith("the run was asked to stop (SIGINT)")


# - Real hosts


class Together:
    """One run: `first` is where it begins."""

    def __init__(
        self, folder: Path, first: Host, steps: int, allowed: str, options: Sequence[str] = (), fault: str = ""
    ) -> None:
        self.folder = folder
        recipe = ["train", RECIPE, "--steps", str(steps), "--set", "batch.micro_size=1", "--json", "--workers", "2"]
        run = [
            *MANYHANDS,
            *recipe,
            "--hosts",
            allowed,
            "--rendezvous",
            f"{first.address}:{PORT}",
            "--run-dir",
            str(folder / "run"),
        ]
        environment = {"STEP_SECONDS": "0.1", "FAULT": fault, "FAULT_TIME": str(folder / "fault-time")}
        self.job = Job(folder, [], [*run, *options, "--checkpoint-every", "2"], environment)
        self.first = self.job.add(first)
        self.join = [*MANYHANDS, "join", f"{first.address}:{PORT}"]

    def add(self, host: Host) -> subprocess.Popen[bytes]:
        return self.job.add(host, self.join)

    def until_workers(self, count: int) -> None:
        """That many have begun, and have made a step more."""
        path = self.folder / "run" / "events.jsonl"

        def made() -> bool:
            told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            began = [index for index, event in enumerate(told) if event["event"] == "began"]
            last = told[began[-1] :] if began else [{}]
            return last[0].get("workers") == count and any(event["event"] == "saved" for event in last)

        self.job.until(made)

    def digest(self) -> object:
        return next(iter(events(self.folder, "ended", "digest")), None)

    def undisturbed(self, steps: int) -> str:
        """What one worker comes to."""
        recipe = ["train", RECIPE, "--steps", str(steps), "--set", "batch.micro_size=1", "--json", "--workers", "1"]
        alone = subprocess.run(
            [*MANYHANDS, *recipe, "--run-dir", str(self.folder / "alone")],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            check=True,
        )
        digest: str = json.loads(alone.stdout.splitlines()[-1])["digest"]
        return digest


def pass_on(host: Host, number: signal.Signals) -> None:
    """To the launcher there: it doesn't see the signals that its namespace's first process gets."""
    for pid in host.processes():
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"manyhands.cli.main" in arguments and arguments[0] == sys.executable.encode():
            os.kill(pid, number)


@needs_hosts
@pytest.mark.slow
def test_a_host_joins_and_leaves_and_no_step_is_made_twice(tmp_path: Path) -> None:
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 50, "1:2")
        run.until_workers(2)
        joined = run.add(other)
        run.until_workers(4)
        pass_on(other, signal.SIGTERM)
        assert joined.wait(60) == 130, run.job.said(other)
        del run.job._running[other.name]
        run.until_workers(2)
        assert run.first.wait(120) == 0, run.job.said(first)
    assert "stopped after step" in run.job.said(other)
    assert run.job.said(first).count("a host has come or gone") == 2
    assert [event for event in events(tmp_path, "began", "repeats") if event] == []
    assert run.digest() == run.undisturbed(50)


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut off", "killed"])
def test_those_that_are_left_go_on_without_a_host_that_is_lost(tmp_path: Path, how: str) -> None:
    """Within seconds, however long workers may take at one thing."""
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 40, "1:2", ["--set", "strategy.stall_seconds=600"])
        run.add(other)
        run.until_workers(4)
        del run.job._running[other.name]
        began = time.monotonic()
        if how == "killed":
            other.end()
        else:
            other.cut_off()
        run.until_workers(2)
        seconds = time.monotonic() - began
        assert run.first.wait(120) == 0, run.job.said(first)
        assert seconds < LOST_SECONDS + 10, run.job.said(first)  # and the workers' start
    assert re.search(r"^worker [23].*\n  where: worker [23] .*host1", run.job.said(first), re.MULTILINE)
    assert run.digest() == run.undisturbed(40)


@needs_hosts
@pytest.mark.slow
def test_a_host_that_is_lost_before_its_workers_have_met_the_others_is_not_waited_for(tmp_path: Path) -> None:
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 40, "1:2", fault="stall start 0 2;stall start 0 3")
        run.until_workers(2)
        run.add(other)
        run.job.until((tmp_path / "fault-time").exists)
        del run.job._running[other.name]
        other.end()
        seconds = run.job.until(lambda: events(tmp_path, "began", "workers") == [2, 2])
        assert run.first.wait(120) == 0, run.job.said(first)
    assert seconds < LOST_SECONDS + 10, seconds
    assert [event for event in events(tmp_path, "began", "repeats") if event] == []


@needs_hosts
@pytest.mark.slow
def test_when_the_first_host_is_stopped_all_stop(tmp_path: Path) -> None:
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 1000, "2")
        joined = run.add(other)
        run.until_workers(4)
        pass_on(first, signal.SIGINT)
        assert run.first.wait(60) == 130, run.job.said(first)
        assert joined.wait(60) != 0, run.job.said(other)
    assert "stopped after step" in run.job.said(first)
    assert "stopped" in run.job.said(other)


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("how", ["waits", "is asked to stop"])
def test_a_host_goes_when_the_first_ones_launcher_is_stopped(tmp_path: Path, how: str) -> None:
    """By SIGSTOP: its connections live, and nothing on it answers."""
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 1000, "2")
        joined = run.add(other)
        run.until_workers(4)
        for pid in first.processes():
            os.kill(pid, signal.SIGSTOP)
        if how == "is asked to stop":
            time.sleep(3)  # by then the launcher there is waiting for an answer
            pass_on(other, signal.SIGTERM)
        assert joined.wait(70) == (130 if how == "is asked to stop" else 1), run.job.said(other)
        assert [pid for pid in other.processes() if b"manyhands" in Path(f"/proc/{pid}/cmdline").read_bytes()] == []
        first.end()
        del run.job._running[first.name]
    assert "Traceback" not in run.job.said(other)
    if how == "waits":
        assert "has not answered for" in run.job.said(other)
