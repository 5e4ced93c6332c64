"""Simulated hosts on one machine: network namespaces on a bridge, with links that can be slow or cut.

Each host has its own address and name, and its commands see only their own processes, so that code that works only
inside one host fails between them. All network devices are in namespaces, so deleting these deletes everything.
Requires root.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

PREFIX = "manyhands"
PROGRAMS = ("ip", "tc", "unshare", "setpriv", "mount")
# In the new namespaces: set the host's name and the names of the others, then exec the command.
BECOME = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def _call(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(command)}: {error.stderr.strip()}") from None


@cache
def why_not() -> str:
    """Return why hosts cannot be simulated on this machine; "" if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux)"
    try:
        with hosts(1, mbit_per_second=1000.0) as (host,):
            host.start(["true"]).wait(10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the kernel allows no network namespaces: {error}"
    return ""


class Host:
    """One simulated host. All hosts can resolve its `name` to its `address`."""

    def __init__(self, number: int, hub: str, hosts_file: Path) -> None:
        self.name, self.address = f"host{number}", f"10.77.0.{number + 1}"
        self._namespace, self._port = f"{hub}-{number}", f"port{number}"
        self._hub, self._hosts_file = hub, hosts_file
        self.commands: list[subprocess.Popen[bytes]] = []

    def plug_in(self, mbit_per_second: float | None) -> None:
        """Connect the host to the hub, with that rate in each direction (None: unlimited)."""
        _call("ip", "netns", "add", self._namespace)
        _call(
            "ip",
            "link",
            "add",
            "eth0",
            "netns",
            self._namespace,
            "type",
            "veth",
            "peer",
            self._port,
            "netns",
            self._hub,
        )
        _call("ip", "-n", self._hub, "link", "set", self._port, "master", "hub", "up")
        _call("ip", "-n", self._namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _call("ip", "-n", self._namespace, "link", "set", device, "up")
        if mbit_per_second is not None:
            self.limit(mbit_per_second)

    def limit(self, mbit_per_second: float) -> None:
        """Give its link, which has no limit yet, that rate in each direction."""
        limit = ["root", "tbf", "rate", f"{mbit_per_second}mbit", "burst", "128kb", "latency", "100ms"]
        _call("tc", "-n", self._namespace, "qdisc", "add", "dev", "eth0", *limit)
        _call("tc", "-n", self._hub, "qdisc", "add", "dev", self._port, *limit)

    def add_address(self, address: str) -> None:
        """Give the host another address, which the other hosts can reach, too."""
        _call("ip", "-n", self._namespace, "address", "add", f"{address}/24", "dev", "eth0")

    def start(
        self, command: Sequence[str], output: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host, with all its output in a file.

        It sees only the processes that it starts. All of them, and their temporary files, end with it and with the
        test.
        """
        isolated = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._namespace]
        isolated += ["unshare", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        become = ["sh", "-c", BECOME, "sh", self.name, str(self._hosts_file), *command]
        with open(output or os.devnull, "ab") as file:
            process = subprocess.Popen(
                [*isolated, *become],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "TMPDIR": str(self._hosts_file.parent), **(environment or {})},
            )
        self.commands.append(process)
        return process

    def cut_off(self) -> None:
        """Drop all traffic without notice, as if the cable were pulled; sockets stay open."""
        _call("ip", "-n", self._hub, "link", "set", self._port, "down")

    def reconnect(self) -> None:
        """Undo `cut_off`."""
        _call("ip", "-n", self._hub, "link", "set", self._port, "up")

    @property
    def bytes_received(self) -> int:
        """Bytes received over its link so far, including headers."""
        return self._bytes("rx")

    @property
    def bytes_sent(self) -> int:
        """Bytes sent over its link so far, including headers."""
        return self._bytes("tx")

    def _bytes(self, direction: str) -> int:
        (link,) = json.loads(_call("ip", "-n", self._namespace, "-s", "-j", "link", "show", "eth0"))
        return int(link["stats64"][direction]["bytes"])

    def processes(self) -> list[int]:
        """Return the pids of its processes, as seen from this machine."""
        return [int(pid) for pid in _call("ip", "netns", "pids", self._namespace).split()]

    def end(self) -> None:
        """Kill all commands on this host."""
        for process in self.commands:
            process.kill()
            process.wait()


@contextmanager
def hosts(count: int, *, mbit_per_second: float | None = None) -> Iterator[list[Host]]:
    """Create `count` hosts for the duration of the block. Raises OSError if the kernel does not allow it."""
    _delete_namespaces(lambda pid: not Path(f"/proc/{pid}").exists())  # those that killed tests have left
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        hub, hosts_file = f"{PREFIX}-{os.getpid()}-{Path(folder).name[-4:]}", Path(folder) / "hosts"
        found = [Host(number, hub, hosts_file) for number in range(count)]
        names = [f"{host.address} {host.name}" for host in found]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        try:
            _call("ip", "netns", "add", hub)
            _call("ip", "-n", hub, "link", "add", "hub", "type", "bridge")
            _call("ip", "-n", hub, "link", "set", "hub", "up")
            for host in found:
                host.plug_in(mbit_per_second)
            yield found
        finally:
            for host in found:
                host.end()
            _delete_namespaces(lambda pid: pid == os.getpid(), hub)


def _delete_namespaces(is_owner: Callable[[int], bool], hub: str = PREFIX) -> None:
    """Delete namespaces whose names start with `hub` and whose creator's pid satisfies `is_owner`."""
    for line in _call("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(hub) and is_owner(int(name.split("-")[1])):
            with suppress(OSError):
                _call("ip", "netns", "delete", name)


def torchrun(
    found: Sequence[Host], workers: int, script: Sequence[str], *, nodes: str = "", restarts: int = 0
) -> list[str]:
    """Return the torchrun command that starts `script` with `workers` workers on each host; the same on all hosts.

    nodes: the allowed number of hosts ("2:3"); default: exactly those.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes or str(len(found))]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{found[0].name}:29400", "--rdzv-id", "test"]
    if nodes:
        rendezvous += ["--rdzv-conf", "last_call_timeout=2"]  # seconds to wait for more hosts once the minimum is there
    return [*run, "--nproc-per-node", str(workers), "--max-restarts", str(restarts), *rendezvous, *script]
