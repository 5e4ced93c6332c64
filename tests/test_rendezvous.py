"""`manyhands train --hosts` and `manyhands join`: hosts join and leave, and the run ends with one worker's bits."""

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
from manyhands.launching import remote_store, rendezvous
from manyhands.launching.launcher import explain_rendezvous_failure, run_workers
from manyhands.launching.remote_store import RemoteStore
from manyhands.launching.rendezvous import (
    PORT,
    HostsRendezvousHandler,
    Rendezvous,
    interface_of,
    own_address,
    parse_endpoint,
)
from manyhands.launching.rendezvous_state import Clocks
from manyhands.launching.root_cause import explain_failure
from manyhands.launching.supervision import StopRequest
from manyhands.members.reports import Failure, WorkerEnd
from support.hosts import Host, hosts
from support.processes import started, suspend
from test_faults import MANYHANDS, PATIENT, SUPPORT
from test_hosts import ENVIRONMENT, Job, events, needs_hosts

RECIPE = str(SUPPORT / "faulty.toml")


def test_an_endpoint_has_a_port_or_gets_the_default() -> None:
    assert parse_endpoint("first") == ("first", PORT)
    assert parse_endpoint("10.0.0.1:4000") == ("10.0.0.1", 4000)
    for wrong in ("", ":1", "first:", "first:x", "first:99999"):
        with pytest.raises(ConfigError, match="this is not a host and port"):
            parse_endpoint(wrong)


def test_the_route_to_a_host_is_known_before_anything_is_sent() -> None:
    assert own_address("127.0.0.1", PORT) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None
    with pytest.raises(ConfigError, match="the host cannot be reached"):
        own_address("no-such-host.invalid", PORT)


def test_joining_fails_where_there_is_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="there is no run to join at this address") as caught:
        rendezvous.join_hosts("127.0.0.1:9", {})
    assert caught.value.where == "127.0.0.1:9"


def test_a_root_cause_on_another_host_is_named_from_reports_of_peers() -> None:
    lost = WorkerError(
        "worker 2 on host b has sent no heartbeat for 10 s", rank=2, where="worker 2 (pid 7 on b), step 4"
    )
    ends = [WorkerEnd(rank=0, exit_code=1, seconds=5.0, failure=Failure.from_error(lost, rank=0, pid=1))]
    found = explain_failure(ends)
    assert isinstance(found, WorkerError)
    assert (found.rank, found.what, found.where) == (2, lost.what, lost.where)


def test_workers_that_all_stopped_on_request_have_not_failed() -> None:
    stopped = Failure.from_error(Interrupted("stopped after step 3, as requested"), rank=0, pid=1)
    found = explain_failure([WorkerEnd(rank=0, exit_code=1, seconds=5.0, failure=stopped)])
    assert isinstance(found, Interrupted)
    assert found.what == "stopped after step 3, as requested"


def ended_with(*errors: Exception) -> list[WorkerEnd]:
    """Return the ends of workers that reported `errors`, for a launcher that does not know their exit codes."""
    reports = [Failure.from_error(error, rank=rank, pid=1) for rank, error in enumerate(errors)]
    return [WorkerEnd(rank=each.rank, exit_code=0, seconds=5.0, failure=each) for each in reports]


def test_a_failed_rendezvous_is_explained_by_the_workers_of_the_host(tmp_path: Path) -> None:
    """On the host of the worker that raised, and on the others, whose workers noticed."""
    stop = StopRequest(tmp_path, 1, 1.0)
    failed = WorkerError("rendezvous failed: the hosts can no longer reach each other", where="first:1")
    elsewhere = WorkerError("worker 2 raised ValueError: no cheese", rank=2, where="worker 2 (pid 7 on b), step 4")
    broken = WorkerError("a worker failed, and the store with its report is lost")
    stopped = Interrupted("stopped after step 3, as requested")
    for ends, rank, what in (
        (ended_with(elsewhere, elsewhere), 2, elsewhere.what),
        (ended_with(broken, ValueError("no cheese")), 1, "worker 1 failed: ValueError: no cheese"),
    ):
        cause = explain_rendezvous_failure(failed, ends, stop)
        assert isinstance(cause, WorkerError)
        assert (cause.rank, cause.what) == (rank, what)
        assert failed.what in str(cause)
    assert explain_rendezvous_failure(failed, ended_with(broken), stop) is failed
    assert explain_rendezvous_failure(failed, [], stop) is failed
    raised = explain_rendezvous_failure(failed, ended_with(ValueError("no cheese"), stopped), stop)
    assert raised.what == "worker 0 failed: ValueError: no cheese"
    # This launcher or another one had stopped the workers, and nobody has requested the run to stop.
    for regroups, ends in ((True, []), (True, ended_with(stopped, stopped)), (False, ended_with(stopped, stopped))):
        stop.regroups = regroups
        left = explain_rendezvous_failure(failed, ends, stop)
        assert isinstance(left, WorkerError)
        assert left.what.startswith("this host has left the run")
        assert "requested" not in str(left)
        assert "clocks of the hosts differ" not in str(left)
    stop.regroups, stop.clock_difference = True, 9.7
    assert "the clocks of the hosts differ by 10 s or more" in str(explain_rendezvous_failure(failed, [], stop))
    stop.stopped_by_first_host = True
    for ends, what in ((ended_with(stopped), stopped.what), ([], "the first host was requested to stop the run")):
        asked = explain_rendezvous_failure(failed, ends, stop)
        assert isinstance(asked, Interrupted)
        assert asked.what == what


def alone(port: int, restarts: int = 1) -> Rendezvous:
    """Return the rendezvous of a run on several hosts that has only one so far."""
    return Rendezvous(
        host="127.0.0.1",
        port=port,
        run_id=f"run-{port}",
        min_hosts=1,
        max_hosts=1,
        max_restarts=restarts,
        is_first=True,
        fingerprints={},
    )


def test_a_port_that_is_in_use_is_reported_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match="the rendezvous address cannot be used") as caught:
            run_workers([sys.executable, "-c", ""], workers=1, rendezvous=alone(port))
    assert caught.value.where == f"127.0.0.1:{port}"
    assert "Address already in use" in str(caught.value.got)


def test_a_stop_request_is_raised_during_a_rendezvous_only_in_the_waiting_thread(tmp_path: Path) -> None:
    """Not in torch's heartbeat thread, which an exception would end."""
    stop, closed = StopRequest(tmp_path, 1, 1.0), []
    heartbeats: list[BaseException | None] = []

    class Handler:
        def next_rendezvous(self) -> RendezvousInfo:
            stop.signal = signal.SIGTERM
            with ThreadPoolExecutor(1) as other:
                heartbeats.append(other.submit(handler._check).exception())
            store = RemoteStore(HashStore(), handler._check)
            info = RendezvousStoreInfo("127.0.0.1", 1)
            return RendezvousInfo(store, 0, 2, info)  # of two hosts; the other one does not arrive

        def set_closed(self) -> None:
            handler._check()  # torch asks the store
            closed.append(True)

    handler = HostsRendezvousHandler.__new__(HostsRendezvousHandler)
    agent = threading.get_ident()
    store = HashStore()
    handler.__dict__.update(_stop=stop, _handler=Handler(), _is_first=True, _agent_thread=agent)
    handler.__dict__.update(_store=store, _clocks=Clocks())
    with pytest.raises(SignalException):  # and no error of the store after its time limit
        handler.next_rendezvous()
    assert (heartbeats, closed) == ([None], [True])


STORE_SERVER = """
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


def test_requests_to_a_store_that_does_not_answer_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's process is stopped, while its connections stay open. Also through torch's stores with a prefix."""
    with started([sys.executable, "-c", STORE_SERVER]) as server:
        assert server.stdout is not None
        client = TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
        polls: list[int] = []
        remote = RemoteStore(client, lambda: polls.append(1))
        store = PrefixStore("round", PrefixStore("run", remote))
        store.multi_set(["a", "b"], ["1", "2"])
        assert store.multi_get(["a", "b"]) == [b"1", b"2"]
        assert (store.add("n", 2), store.compare_set("a", "1", "3"), store.get("a")) == (2, b"3", b"3")
        with pytest.raises(DistStoreError, match=r"c were not set within 0\.1 s"):
            store.wait(["c"], timedelta(seconds=0.1))
        suspend(server)
        monkeypatch.setattr(remote_store, "ANSWER_SECONDS", 1.0)
        polls.clear()
        with pytest.raises(DistNetworkError, match="the first host has not answered for 1 s"):
            store.check(["a"])
        assert len(polls) > 2  # before the request, and repeatedly during it
        polls.clear()
        with pytest.raises(DistNetworkError):  # fails at once, without a request
            store.set("a", "4")
        assert len(polls) == 1


LEAVES_A_CHILD = """
import os, subprocess, sys
from pathlib import Path
pid_file = Path(sys.argv[1])
if pid_file.exists():
    status = Path("/proc") / pid_file.read_text() / "status"
    sys.exit(7 if status.exists() and "State:\\tZ" not in status.read_text() else 0)
pid_file.write_text(str(subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL).pid))
os.kill(os.getpid(), 9)
"""


def test_processes_of_a_killed_worker_are_killed_before_workers_are_restarted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", LEAVES_A_CHILD, str(tmp_path / "pid")]
    run_workers(command, workers=1, rendezvous=alone(port))
    assert (tmp_path / "pid").exists()


def wait_until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def can_be_reached(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), 1.0):
        return True
    return False


def test_a_host_that_waits_for_others_can_be_stopped(tmp_path: Path) -> None:
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
        told = f"other hosts join this run with: manyhands join {endpoint} {RECIPE} "
        assert process.stderr.readline().startswith(told)
        wait_until(lambda: can_be_reached(endpoint))  # from then on it handles signals, too
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 130
        assert "\nthe run was stopped by SIGINT" in process.stderr.read()


def test_a_traceback_is_shown_before_the_workers_are_restarted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    options = f"--workers 1 --hosts 1 --rendezvous {endpoint} --max-restarts 1 --run-dir {tmp_path / 'run'}"
    environment = {**os.environ, "FAULT": "raise load 0 0", "FAULT_TIME": str(tmp_path / "fault")}
    command = [*MANYHANDS, "train", RECIPE, *PATIENT, *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1
    before, _, after = done.stderr.partition("restarting with the hosts that are now in the run")
    for shown in (before, after):  # of the first attempt, and of the second, which is the last
        assert "recipe.data[" in shown
        assert "misbehave(" in shown, "the traceback of the data set"


# - Real hosts


class Together:
    """One run on several hosts. first: the host that starts it."""

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
        self.job = Job(folder, [], [*run, *options, *PATIENT, "--checkpoint-every", "2"], environment)
        self.first = self.job.add(first)
        same = [
            "--steps",
            str(steps),
            "--set",
            "batch.micro_size=1",
            "--run-dir",
            str(folder / "run"),
            *options,
            *PATIENT,
        ]
        address = f"{first.address}:{PORT}"
        self.join = [*MANYHANDS, "join", address, RECIPE, "--workers", "2", *same, "--checkpoint-every", "2"]

    def add(self, host: Host) -> subprocess.Popen[bytes]:
        return self.job.add(host, self.join)

    def until_workers(self, count: int) -> None:
        """Wait until the run was last started with `count` workers and has saved since."""
        path = self.folder / "run" / "events.jsonl"

        def has_saved() -> bool:
            found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            starts = [index for index, event in enumerate(found) if event["event"] == "started"]
            last = found[starts[-1] :] if starts else [{}]
            return last[0].get("workers") == count and any(event["event"] == "saved" for event in last)

        self.job.until(has_saved)

    def digest(self) -> object:
        return next(iter(events(self.folder, "ended", "digest")), None)

    def undisturbed(self, steps: int) -> str:
        """Return the digest that one worker ends with."""
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


def send_to_launcher(host: Host, number: signal.Signals) -> None:
    """Send a signal to the launcher on that host; it does not get those sent to its namespace's first process."""
    for pid in host.processes():
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"manyhands.cli.main" in arguments and arguments[0] == sys.executable.encode():
            os.kill(pid, number)


@needs_hosts
@pytest.mark.slow
def test_a_host_joins_and_leaves_and_no_step_is_repeated(tmp_path: Path) -> None:
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 50, "1:2")
        run.until_workers(2)
        joined = run.add(other)
        run.until_workers(4)
        send_to_launcher(other, signal.SIGTERM)
        assert joined.wait(240) == 130, run.job.output(other)
        del run.job._running[other.name]
        run.until_workers(2)
        assert run.first.wait(240) == 0, run.job.output(first)
    assert "stopped after step" in run.job.output(other)
    assert re.search(r"this host takes part in the run from step (\d+) on\nstep \1/50 .* left", run.job.output(other))
    assert run.job.output(first).count("a host joined, left or seems lost") == 2
    assert [event for event in events(tmp_path, "started", "repeats") if event] == []
    assert run.digest() == run.undisturbed(50)


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut off", "killed"])
def test_the_remaining_hosts_continue_without_a_lost_host(tmp_path: Path, how: str) -> None:
    """Although stall_seconds is large."""
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 40, "1:2")
        run.add(other)
        run.until_workers(4)
        del run.job._running[other.name]
        if how == "killed":
            other.end()
        else:
            other.cut_off()
        run.until_workers(2)
        assert run.first.wait(240) == 0, run.job.output(first)
    assert re.search(r"^worker [23].*\n  where: worker [23] .*host1", run.job.output(first), re.MULTILINE)
    assert run.digest() == run.undisturbed(40)


@needs_hosts
@pytest.mark.slow
def test_a_host_lost_during_start_up_does_not_block_the_others(tmp_path: Path) -> None:
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 40, "1:2", fault="stall start 0 2;stall start 0 3")
        run.until_workers(2)
        run.add(other)
        run.job.until((tmp_path / "fault-time").exists)
        del run.job._running[other.name]
        other.end()
        run.job.until(lambda: events(tmp_path, "started", "workers") == [2, 2])
        assert run.first.wait(240) == 0, run.job.output(first)
    assert [event for event in events(tmp_path, "started", "repeats") if event] == []


@needs_hosts
@pytest.mark.slow
def test_all_hosts_stop_when_the_first_host_is_stopped(tmp_path: Path) -> None:
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 1000, "2")
        joined = run.add(other)
        run.until_workers(4)
        send_to_launcher(first, signal.SIGINT)
        assert run.first.wait(240) == 130, run.job.output(first)
        assert joined.wait(240) != 0, run.job.output(other)
    assert "stopped after step" in run.job.output(first)
    assert "stopped" in run.job.output(other)


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("how", ["waits", "gets SIGTERM"])
def test_a_host_leaves_when_the_first_hosts_launcher_is_stopped(tmp_path: Path, how: str) -> None:
    """By SIGSTOP: its connections stay open, but nothing on it answers."""
    with hosts(2) as (first, other):
        run = Together(tmp_path, first, 1000, "2")
        joined = run.add(other)
        run.until_workers(4)
        for pid in first.processes():
            os.kill(pid, signal.SIGSTOP)
        if how == "gets SIGTERM":
            time.sleep(3)  # by then the launcher there is waiting for an answer
            send_to_launcher(other, signal.SIGTERM)
        assert joined.wait(240) == (130 if how == "gets SIGTERM" else 1), run.job.output(other)
        assert [pid for pid in other.processes() if b"manyhands" in Path(f"/proc/{pid}/cmdline").read_bytes()] == []
        first.end()
        del run.job._running[first.name]
    assert "Traceback" not in run.job.output(other)
    if how == "waits":
        assert "has not answered for" in run.job.output(other)
