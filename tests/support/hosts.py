"""Hosts that are really apart, on one machine: network namespaces on a bridge, with links that are slow or cut.

Each has an address and a name of its own, and its commands see no process but their own, so that what works only inside
a host fails between these. All network devices are in namespaces; with these everything is gone. Needs root.
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
# In the new namespaces: take the host's name, know the others by theirs, then become the command.
BECOME = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def _call(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(command)}: {error.stderr.strip()}") from None


@cache
def why_not() -> str:
    """Why there can be no hosts here; "" if there can."""
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
    """One of them. `name` and `address` are known to all of them."""

    def __init__(self, number: int, hub: str, hosts_file: Path) -> None:
        self.name, self.address = f"host{number}", f"10.77.0.{number + 1}"
        self._namespace, self._port = f"{hub}-{number}", f"port{number}"
        self._hub, self._hosts_file = hub, hosts_file
        self.commands: list[subprocess.Popen[bytes]] = []

    def plug_in(self, mbit_per_second: float | None) -> None:
        """Connect it to the hub, both ways at that rate (None: as fast as the machine)."""
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
            limit = ["root", "tbf", "rate", f"{mbit_per_second}mbit", "burst", "128kb", "latency", "100ms"]
            _call("tc", "-n", self._namespace, "qdisc", "add", "dev", "eth0", *limit)
            _call("tc", "-n", self._hub, "qdisc", "add", "dev", self._port, *limit)

    def start(
        self, command: Sequence[str], output: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command on it, with all output in a file. It sees the processes that it starts and no other; all of
        them end with it, and with the test, and so do their temporary files."""
        apart = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._namespace]
        apart += ["unshare", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        become = ["sh", "-c", BECOME, "sh", self.name, str(self._hosts_file), *command]
        with open(output or os.devnull, "ab") as file:
            process = subprocess.Popen(
                [*apart, *become],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "TMPDIR": str(self._hosts_file.parent), **(environment or {})},
            )
        self.commands.append(process)
        return process

    def cut_off(self) -> None:
        """Pull the cable: nothing arrives or leaves, and nobody is told; sockets stay open."""
        _call("ip", "-n", self._hub, "link", "set", self._port, "down")

    def reconnect(self) -> None:
        """Put it back in."""
        _call("ip", "-n", self._hub, "link", "set", self._port, "up")

    @property
    def bytes_received(self) -> int:
        """Over its link so far, with all headers."""
        (link,) = json.loads(_call("ip", "-n", self._namespace, "-s", "-j", "link", "show", "eth0"))
        return int(link["stats64"]["rx"]["bytes"])

    def processes(self) -> list[int]:
        """Of what runs on it, as this machine counts them."""
        return [int(pid) for pid in _call("ip", "netns", "pids", self._namespace).split()]

    def end(self) -> None:
        """End what runs on it."""
        for process in self.commands:
            process.kill()
            process.wait()


@contextmanager
def hosts(count: int, *, mbit_per_second: float | None = None) -> Iterator[list[Host]]:
    """So many hosts, for as long as this lasts. Raises OSError where the kernel forbids it."""
    _clear(lambda pid: not Path(f"/proc/{pid}").exists())  # what a killed test left
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
            _clear(lambda pid: pid == os.getpid(), hub)


def _clear(of_whom: Callable[[int], bool], hub: str = PREFIX) -> None:
    """Remove the namespaces whose names begin with `hub` and that tests of those pids made."""
    for line in _call("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(hub) and of_whom(int(name.split("-")[1])):
            with suppress(OSError):
                _call("ip", "netns", "delete", name)


def torchrun(
    found: Sequence[Host], workers: int, script: Sequence[str], *, nodes: str = "", restarts: int = 0
) -> list[str]:
    """What starts `script` with so many workers on each host, as torchrun's manual has it: the same on all hosts.

    nodes: how many hosts there may be ("2:3"), if not just those.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes or str(len(found))]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{found[0].name}:29400", "--rdzv-id", "test"]
    if nodes:
        meet += ["--rdzv-conf", "last_call_timeout=2"]  # seconds to wait for more than the fewest
    return [*run, "--nproc-per-node", str(workers), "--max-restarts", str(restarts), *meet, *script]
