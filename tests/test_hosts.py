"""Simulated hosts (support/hosts.py): one digest, less traffic between hosts, and no worker waits for a lost host."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints
from manyhands.comm.group import Group
from manyhands.comm.hierarchical import workers_by_host
from support.hosts import PREFIX, Host, hosts, torchrun, why_not
from support.models import GPT_UNITS, gpt_recipe
from support.processes import started
from support.threads import host_groups, run_threads
from support.training import train_with_engine
from test_faults import MANYHANDS, PATIENT, SUPPORT
from test_parity import PRECISIONS, STEPS, WORKER, job, oracle_digest

needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts are available")
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(SUPPORT.parent), str(SUPPORT)]), "OMP_NUM_THREADS": "1"}


class Job:
    """A command that runs on several hosts from the constructor on; its output on host H is in `folder / H`."""

    def __init__(self, folder: Path, on: Sequence[Host], command: Sequence[str], environment: dict[str, str]) -> None:
        self.folder, self.hosts, self.command = folder, [], command
        self._environment = ENVIRONMENT | environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for host in on:
            self.add(host)

    def add(self, host: Host, command: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start the command, or another one, on one more host."""
        self.hosts.append(host)
        started = host.start(command or self.command, self.folder / host.name, self._environment)
        self._running[host.name] = started
        return started

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Wait until all commands have ended; return their exit codes."""
        return [process.wait(seconds) for process in self._running.values()]

    def output(self, host: Host) -> str:
        return (self.folder / host.name).read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        """Wait for a condition. Fails if a command fails or it takes too long."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > seconds or any(process.poll() for process in self._running.values()):
                pytest.fail("\n".join(f"{host.name}:\n{self.output(host)}" for host in self.hosts))
            time.sleep(0.05)


def workers_on(host: Host, script: str) -> int:
    """Return the number of processes on a host that run a script."""
    found = 0
    for pid in host.processes():
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found += b"torch.distributed.run" not in arguments and any(part.endswith(script.encode()) for part in arguments)
    return found


def digests(folder: Path, found: Sequence[Host], transport: str, shardings: Sequence[str]) -> list[dict[str, str]]:
    """Return the digests of each worker by "sharding precision"; 2 workers on each host train one after the other."""
    jobs = [
        job(f"{sharding} {precision}", precision, sharding) for sharding, precision in product(shardings, PRECISIONS)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = torchrun(found, 2, [str(WORKER), str(folder), transport, str(folder / "jobs.json")])
    running = Job(folder, found, command, {})
    assert not any(running.wait()), "\n".join(map(running.output, found))
    return [json.loads((folder / f"worker-{rank}.json").read_text()) for rank in range(2 * len(found))]


def test_workers_are_grouped_by_host_if_hosts_have_equal_numbers() -> None:
    assert workers_by_host(["a", "a", "b", "b"]) == [[0, 1], [2, 3]]
    assert workers_by_host(["a", "b", "a", "b", "a", "b"]) == [[0, 2, 4], [1, 3, 5]]
    assert workers_by_host(["a", "a"]) is None
    assert workers_by_host(["a", "b"]) is None
    assert workers_by_host(["a", "a", "b"]) is None


@pytest.mark.parametrize(
    ("count", "sharding", "precision"), [(2, "ddp", "bf16"), (3, "zero2", "fp32"), (2, "zero3", "bf16")]
)
def test_hierarchical_groups_have_the_oracles_digest(count: int, sharding: str, precision: str) -> None:
    """With threads as workers of several hosts: faster, and without root."""

    def work(group: Group) -> str:
        strategy = mh.Strategy(sharding=sharding, units=GPT_UNITS)
        return train_with_engine(gpt_recipe(precision), strategy, steps=STEPS, group=group).digest

    found = run_threads(2 * count, work, makers=host_groups(count, 2))
    assert found == [oracle_digest(precision)] * (2 * count)


JOINS = """
import sys
from manyhands.comm.connect import connect
group = connect("distributed")
sys.stdout.write(str(group.size))
group.close()
"""


def test_workers_meet_although_their_launchers_have_restarted_them_unequally_often() -> None:
    """torch's launcher on a host counts only the failures of its own workers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        workers = []
        for rank in (0, 1):
            own = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(3 * rank)}
            workers.append(stack.enter_context(started([sys.executable, "-c", JOINS], env=os.environ | place | own)))
        assert [worker.communicate(timeout=60)[0] for worker in workers] == ["2", "2"]


SERVER = """
import socket, sys
connection, _ = socket.create_server((sys.argv[1], 7000)).accept()
while connection.recv(1 << 20):
    pass
"""
CLIENT = """
import os, socket, sys, time
print(socket.gethostname(), len([name for name in os.listdir("/proc") if name.isdigit()]))
while True:
    try:
        connection = socket.create_connection((sys.argv[1], 7000), 1)
        break
    except OSError:  # the server doesn't listen yet, or never will
        if sys.argv[2:]:
            raise
        time.sleep(0.02)
connection.settimeout(None)
started = time.monotonic()
connection.sendall(bytes(2_000_000))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)  # returns once the other side has received everything and exits
print(time.monotonic() - started)
"""


@needs_hosts
def test_simulated_hosts_are_separate_slow_and_can_be_cut_off(tmp_path: Path) -> None:
    with hosts(2, mbit_per_second=50.0) as (first, second):
        server = second.start([sys.executable, "-c", SERVER, second.name])
        assert first.start([sys.executable, "-c", CLIENT, second.name], tmp_path / "client").wait(240) == 0
        assert server.wait(240) == 0
        assert second.bytes_received > 2_000_000
        second.cut_off()
        assert first.start([sys.executable, "-c", CLIENT, second.name, "once"]).wait(240) != 0
        left = second.start(["sleep", "600"])
    name, processes, seconds = (tmp_path / "client").read_text().split()
    assert name == first.name
    assert int(processes) == 1  # of all processes of this machine
    assert float(seconds) > 0.2  # 0.32 without the initial burst
    assert left.poll() is not None
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"{PREFIX}-{os.getpid()}-" not in namespaces


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_every_sharding_has_the_oracles_digest_on_several_hosts(tmp_path: Path, count: int) -> None:
    with hosts(count) as found:
        for each in digests(tmp_path, found, "auto", ("ddp", "zero1", "zero2", "zero3")):
            assert each == {name: oracle_digest(name.split()[1]) for name in each}


@needs_hosts
@pytest.mark.slow
def test_a_host_receives_less_with_hierarchical_groups(tmp_path: Path) -> None:
    received: dict[str, int] = {}
    for transport in ("distributed", "hierarchical"):
        with hosts(2) as found:
            (tmp_path / transport).mkdir()
            for each in digests(tmp_path / transport, found, transport, ("ddp", "zero2", "zero3")):
                assert each == {name: oracle_digest(name.split()[1]) for name in each}
            received[transport] = sum(host.bytes_received for host in found)
    assert received["hierarchical"] < 0.7 * received["distributed"]


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1])
def test_when_a_host_is_cut_off_both_sides_end_and_name_it(tmp_path: Path, cut: int) -> None:
    with hosts(3) as found:
        command = torchrun(found, 2, [str(SUPPORT / "endless_worker.py"), str(tmp_path), "auto"])
        running = Job(tmp_path, found, command, {})
        running.until((tmp_path / "began").exists)
        found[cut].cut_off()
        while any(workers_on(host, "endless_worker.py") for host in found):  # they make steps for ever
            time.sleep(0.1)
        # The store is on the first host: without it, the others cannot report failures to each other.
        for host in found:
            message, name = r"sent no heartbeat", "host[12]" if cut == 0 else found[cut].name
            if host.name != found[0].name and cut in (0, int(host.name[-1])):
                message, name = r"not answered", found[0].name
            assert re.search(f"WorkerError: worker .*{name}.*{message} for 10 s", running.output(host)), running.output(
                host
            )


@needs_hosts
@pytest.mark.slow
def test_the_worker_that_hangs_is_named_and_not_one_that_waits(tmp_path: Path) -> None:
    with hosts(2) as found:
        command = torchrun(found, 2, [str(SUPPORT / "faulty.py"), "loop", "auto"])
        fault = {"FAULT": "stall backward 2 3", "FAULT_TIME": str(tmp_path / "fault-time"), "STALL_SECONDS": "5"}
        running = Job(tmp_path, found, command, fault)
        assert running.wait() == [1, 1]
    for host in found:  # the error may be of the worker on its host, which has its stack, or of another one
        assert "WorkerError: worker 3 has stalled: its peers have waited for more than 5 s" in running.output(host)


@needs_hosts
@pytest.mark.slow
def test_a_worker_killed_on_another_host_is_named_within_the_shortened_limit(tmp_path: Path) -> None:
    with hosts(2) as found:
        command = torchrun(found, 1, [str(SUPPORT / "endless_worker.py"), str(tmp_path), "auto"])
        running = Job(tmp_path, found, command, {})
        running.until((tmp_path / "began").exists)
        for process in found[1].commands:  # and its launcher, which could report it
            process.kill()
        while workers_on(found[0], "endless_worker.py"):
            time.sleep(0.1)
        assert re.search(r"WorkerError: worker 1 .*host1.*sent no heartbeat for 3 s", running.output(found[0]))


def elastic(folder: Path, steps: int) -> tuple[str, list[str]]:
    """Return the digest that one worker ends with, and the arguments that train the same on several hosts."""
    recipe = ["train", str(SUPPORT / "faulty.toml"), "--steps", str(steps), "--set", "batch.micro_size=1", *PATIENT]
    recipe.append("--json")
    alone = subprocess.run(
        [*MANYHANDS, *recipe, "--workers", "1", "--run-dir", str(folder / "alone")],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    where = ["--run-dir", str(folder / "run"), "--checkpoint-every", "1"]
    return json.loads(alone.stdout.splitlines()[-1])["digest"], ["-m", "manyhands.cli.main", *recipe, *where]


def events(folder: Path, event: str, of: str) -> list[object]:
    """Return the value `of` of each of the run's events with this name."""
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [found[of] for found in map(json.loads, lines) if found["event"] == event]


# As in docs/hosts.md: without this variable a new host does not learn the address of the others.
ELASTIC_ENVIRONMENT = {"STEP_SECONDS": "0.1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@needs_hosts
@pytest.mark.slow
def test_a_host_that_is_added_changes_no_bit(tmp_path: Path) -> None:
    expected, train = elastic(tmp_path, 60)
    with hosts(3) as found:
        running = Job(tmp_path, found[:2], torchrun(found, 1, train, nodes="2:3", restarts=3), ELASTIC_ENVIRONMENT)
        running.until(lambda: len(list_checkpoints(tmp_path / "run" / "checkpoints")) > 0)
        running.add(found[2])
        assert running.wait() == [0, 0, 0], "\n".join(map(running.output, found))
    assert events(tmp_path, "started", "workers") == [2, 3]
    assert events(tmp_path, "ended", "digest") == [expected]


@needs_hosts
@pytest.mark.slow
def test_the_other_hosts_continue_without_a_lost_one(tmp_path: Path) -> None:
    expected, train = elastic(tmp_path, 20)
    with hosts(3) as found:
        running = Job(tmp_path, found, torchrun(found, 1, train, nodes="2:3", restarts=3), ELASTIC_ENVIRONMENT)
        running.until(lambda: len(list_checkpoints(tmp_path / "run" / "checkpoints")) > 0)
        found[2].cut_off()
        running.until(lambda: events(tmp_path, "ended", "digest") == [expected])
    assert events(tmp_path, "started", "workers") == [3, 2]
