"""What strangers write into the rendezvous of several hosts is never executed, and ends in clear errors."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shlex
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

from manyhands.checkpoint.format import list_checkpoints
from manyhands.errors import ConfigError, WorkerError
from manyhands.launching.launcher import run_workers
from manyhands.launching.remote_store import RemoteStore
from manyhands.launching.rendezvous import Rendezvous, join_hosts
from manyhands.launching.rendezvous_state import state_of, state_to_json
from support.evil import Evil
from support.processes import started
from test_faults import PATIENT, SUPPORT
from test_rendezvous import can_be_reached, wait_until

WITHOUT_PICKLE = """
import _pickle, contextlib, pickle, runpy, sys
with contextlib.suppress(ImportError):
    import dill  # torch imports it if it is installed, and its own import needs an unpickler to derive from
def refuse(*arguments, **options):
    raise RuntimeError("the launcher unpickled something")
for module in (pickle, _pickle):
    module.load = module.loads = module.Unpickler = refuse
runpy.run_module("manyhands.cli.main", run_name="__main__", alter_sys=True)
"""


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def two_hosts_in_one(port: int, host: str = "127.0.0.1") -> Rendezvous:
    return Rendezvous(
        host=host,
        port=port,
        run_id="run",
        min_hosts=1,
        max_hosts=2,
        max_restarts=0,
        is_first=True,
        fingerprints={},
    )


def test_launchers_of_two_hosts_unpickle_nothing_and_join_only_the_same_run(tmp_path: Path) -> None:
    """The other host joins from another folder with the printed command.

    The first host's folders are relative, and --adopt is not among the arguments of the join command.
    """
    endpoint, proof = f"127.0.0.1:{free_port()}", tmp_path / "proof"
    (tmp_path / "first").mkdir()
    (tmp_path / "other").mkdir()
    launcher = [sys.executable, "-c", WITHOUT_PICKLE]
    recipe = [str(SUPPORT / "faulty.toml"), "--steps", "2", "--set", "batch.micro_size=1", *PATIENT]
    folders = ["--run-dir", "run", "--checkpoint-dir", "kept", "--adopt"]
    evil = ["--set", "data.path=os:mkdir", "--set", f"data.arguments.path={proof}", "--steps", "7"]
    run = ["train", *recipe, *folders, "--workers", "1", "--hosts", "2", "--rendezvous", endpoint]
    # The tests' PYTHONPATH may be relative, too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    there: dict[str, Any] = {"cwd": tmp_path / "other", "env": environment}
    with started([*launcher, *run], cwd=tmp_path / "first", env=environment) as first:
        assert first.stderr is not None
        command = shlex.split(first.stderr.readline().partition("other hosts join this run with: ")[2])
        assert command[:3] == ["manyhands", "join", endpoint]
        wait_until(lambda: can_be_reached(endpoint))
        with started([*launcher, "join", endpoint, *recipe, "--run-dir", "run", *evil], **there) as stranger:
            _, errors = stranger.communicate(timeout=240)
        assert stranger.returncode == 2, errors
        differing = errors.partition("different: ")[2].replace(",", "").split()
        assert {"--steps", "data.arguments.path", "data.path"} <= set(differing), errors
        with started([*launcher, *command[1:]], **there) as other:
            _, errors = other.communicate(timeout=240)
            assert other.returncode == 0, errors
        _, errors = first.communicate(timeout=240)
        assert first.returncode == 0, errors
    assert not proof.exists()
    assert list_checkpoints(tmp_path / "first" / "kept")
    assert not list((tmp_path / "other").iterdir())


HONEST = {"run_id": "0" * 32, "min_hosts": 1, "max_hosts": 2, "max_restarts": 0, "fingerprints": {"seed": "7"}}


@pytest.mark.parametrize(
    ("published", "error"),
    [
        (HONEST, None),
        (HONEST | {"host": "203.0.113.7", "on_restart": "os:abort", "is_first": True}, None),
        (HONEST | {"fingerprints": {"seed": "7", "\x1b[2J": "1"}}, "different: \\x1b[2J"),
        (HONEST | {"fingerprints": {}}, "different: seed"),
        (HONEST | {"fingerprints": [1]}, "the fingerprints are not valid"),
        (HONEST | {"run_id": "../../run"}, "the name of the run was not made by Manyhands"),
        (HONEST | {"max_hosts": 10**9}, "the numbers of hosts and restarts are not valid"),
        ({}, "there is no run to join"),
        ([[[]]], "there is no run to join"),
    ],
)
def test_a_strangers_description_of_a_run_is_only_compared(published: object, error: str | None) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("manyhands/run", json.dumps(published))
    if error is None:
        found = join_hosts(f"127.0.0.1:{store.port}", {"seed": "7"})
        assert (found.host, found.is_first, found.on_restart, found.run_id) == ("127.0.0.1", False, None, "0" * 32)
    else:
        with pytest.raises(ConfigError) as caught:
            join_hosts(f"127.0.0.1:{store.port}", {"seed": "7"})
        assert error in str(caught.value)


def attack(port: int, run_id: str, value: bytes) -> None:
    """Replace the state of the rendezvous as soon as there is one, and the values that launchers exchange."""
    while True:
        with suppress(DistError):
            store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
            store.wait([f"torch.rendezvous.{run_id}"])
            break
    store.set(f"torch.rendezvous.{run_id}", value.decode())


@pytest.mark.parametrize("kind", ["pickle", "garbage", "not base64"])
def test_a_strangers_state_is_not_executed_and_named_in_the_error(tmp_path: Path, kind: str) -> None:
    proof, port = tmp_path / "proof", free_port()
    values = {
        "pickle": base64.b64encode(pickle.dumps(Evil(proof))),
        "garbage": base64.b64encode(b'{"round": [[[['),
        "not base64": b"x",
    }
    attacker = threading.Thread(target=attack, args=(port, "run", values[kind]))
    attacker.start()
    with pytest.raises(WorkerError, match="its store holds a value that no launcher of this run wrote"):
        run_workers([sys.executable, "-c", "input()"], workers=1, rendezvous=two_hosts_in_one(port))
    attacker.join()
    assert not proof.exists()


def test_other_values_of_a_stranger_are_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's launcher parses the port of the workers and their ranks, which it reads from the store."""
    monkeypatch.setattr(RemoteStore, "multi_get", lambda store, keys: [b"\x1b[31m{"] * len(keys))
    with pytest.raises(WorkerError, match="its store holds a value that no launcher") as caught:
        run_workers([sys.executable, "-c", ""], workers=1, rendezvous=two_hosts_in_one(free_port()))
    assert "\x1b" not in str(caught.value)


def test_a_state_survives_json_and_nothing_else_is_one() -> None:
    one, other = _NodeDesc("first", 7, 0), _NodeDesc("second", 8, 1)
    state = _RendezvousState()
    state.round, state.complete, state.closed = 3, True, False
    state.deadline = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    state.participants, state.wait_list, state.redundancy_list = {one: 0, other: 1}, {other, one}, {one}
    state.last_heartbeats = {one: state.deadline, other: datetime.now(UTC)}
    text = state_to_json(state)
    assert vars(state_of(text)) == vars(state)
    assert state_to_json(state_of(text)) == text
    wrong = [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"{}",
        b"[" * 100_000,
        b" " * (2 << 20) + text,
        text.replace(b"true", b'"yes"'),
        text.replace(b"3", b"1e400"),
        text.replace(b'"first"', b"1"),
        text.replace(b'"deadline": ', b'"deadline": 1e300, "x": '),
        text.replace(b'"participants": [', b'"participants": [1, '),
        text.replace(b'"wait_list": [', b'"wait_list": [[], '),
        pickle.dumps(state),
    ]
    for each in wrong:
        with pytest.raises(RendezvousStateError, match="was not written by a launcher"):
            state_of(each)


ONLY_THERE = """
import socket, sys
port = int(sys.argv[1])
socket.create_connection(("127.0.0.2", port)).close()
try:
    socket.create_connection(("127.0.0.1", port))
except ConnectionRefusedError:
    sys.exit(0)
sys.exit("it also listens on 127.0.0.1")
"""


def test_the_rendezvous_listens_only_on_the_address_that_was_named() -> None:
    port = free_port("127.0.0.2")
    command = [sys.executable, "-c", ONLY_THERE, str(port)]
    run_workers(command, workers=1, rendezvous=two_hosts_in_one(port, "127.0.0.2"))
    with pytest.raises(ConfigError, match="the rendezvous address cannot be used"):  # of another host
        run_workers(command, workers=1, rendezvous=two_hosts_in_one(port, "203.0.113.7"))


WORKER_STORE = (
    """
import atexit
from manyhands.comm.connect import connect
connect("distributed").close()
group = connect("distributed")  # a process may connect several times
atexit.register(group.close)
"""
    + ONLY_THERE
)


def test_the_store_of_the_workers_listens_only_on_its_address(tmp_path: Path) -> None:
    port = free_port("127.0.0.2")
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port)}
    with started([sys.executable, "-c", WORKER_STORE, str(port)], env=os.environ | place) as worker:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors
