"""Checks one machine, or several together, before a run.

What a machine has for a run, and what would fail on it: looked at before anything is started.

What several machines have in common, and how far they are apart: looked at together before a run.
"""

from __future__ import annotations

import mmap
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from manyhands.comm.connect import connect
from manyhands.comm.group import Group
from manyhands.engine.agreement import all_gather_json
from manyhands.errors import ConfigError
from manyhands.formatting import GIB, MIB, format_bytes, format_seconds
from manyhands.numerics.arithmetic import numerics_identity
from manyhands.offload.process_memory import free_memory_bytes
from manyhands.offload.scratch import MEMORY_FILE_SYSTEMS, file_system_of, measure_speed

LEAST_MEMORY_BYTES = GIB

LEAST_DISK_BYTES = GIB

LEAST_FILES = 1024

SLOW_GB_PER_SECOND = 0.1

_NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p"})

Verdict = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """What was found about one subject. bad: runs will fail; warning: they may, or are slow. hint: what to do."""

    subject: str
    verdict: Verdict
    told: str
    hint: str | None = None


def check_machine(folder: Path) -> Iterator[Finding]:
    """One finding after the other; the last ones take a second. folder: where runs are to be written."""
    checks: tuple[Callable[[], Finding], ...] = (
        _versions,
        _cpus,
        _memory,
        _shared_memory,
        _watching,
        _ports,
        _host_name,
        _files,
        _gpus,
        lambda: _disk(folder),
    )
    for check in checks:
        yield check()


def _versions() -> Finding:
    import torch

    from manyhands import __version__

    told = (
        f"manyhands {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    if not sys.platform.startswith("linux"):
        return Finding("versions", "warning", told, "several workers need Linux; here, one works")
    return Finding("versions", "good", told)


def _cpus() -> Finding:
    from manyhands.numerics.arithmetic import bf16_instructions  # which loads torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    told = f"{usable} of {os.cpu_count()} for this process, load {load:.1f}"
    told += f", bf16 by {bf16_instructions()}" if bf16_instructions() else ", no bf16 instructions (fp32 stands in)"
    quota = _cpu_quota()
    if quota is not None and quota < usable:
        told += f", {quota:g} by its control group"
        return Finding("CPUs", "warning", told, f"use at most {max(1, int(quota))} workers x threads: more only wait")
    if load > usable / 2:
        return Finding("CPUs", "warning", told, "others compute here, too: steps wait for the slowest worker")
    return Finding("CPUs", "good", told)


def _cpu_quota() -> float | None:
    """CPUs' worth of time that the control group may use."""
    with suppress(OSError, ValueError):
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(most) / int(period)
    with suppress(OSError, ValueError):
        first = Path("/sys/fs/cgroup/cpu")
        most, period = ((first / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(most) / int(period) if int(most) > 0 else None
    return None


def _memory() -> Finding:
    free, total = free_memory_bytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = f"{format_bytes(free)} free of {format_bytes(total)}"
    if free < LEAST_MEMORY_BYTES:
        return Finding("memory", "bad", told, "torch alone takes about 400 MiB a worker: end other programs")
    return Finding("memory", "good", told)


_CHILD = "import mmap, os, sys; mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)[:5] = b'hello'"


def _shared_memory() -> Finding:
    """Whether another process can open this one's memory as workers do."""
    subject = "shared memory"
    if not hasattr(os, "memfd_create"):
        return Finding(
            subject, "warning", "this system has no memfd_create", "use one worker, or transport = 'distributed'"
        )
    fd = os.memfd_create("manyhands-doctor")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        command = [sys.executable, "-I", "-S", "-c", _CHILD, f"/proc/{os.getpid()}/fd/{fd}"]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if os.pread(fd, 5, 0) == b"hello":
            return Finding(subject, "good", "workers can open each other's")
    finally:
        os.close(fd)
    said = child.stderr.strip().splitlines()
    why = said[-1] if said else "it was not seen"
    return Finding(
        subject,
        "bad",
        f"a process can't open another one's: {why}",
        "mount /proc without hidepid, or use --transport distributed",
    )


def _watching() -> Finding:
    """Whether workers can notice that another one has died."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return Finding(
            "watching", "bad", f"pidfd_open fails: {error}", "use Linux 5.3 or newer; allow it in seccomp's profile"
        )
    return Finding("watching", "good", "a process's end is noticed by others")


def _ports() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            return Finding("ports", "good", "a socket on 127.0.0.1 can be listened to and reached")
    except OSError as error:
        return Finding("ports", "bad", f"127.0.0.1 can't be listened to or reached: {error}", "look at the firewall")


def _host_name() -> Finding:
    """torch.distributed's Gloo listens where the host's name points to."""
    name = socket.gethostname()
    hint = "for workers on several hosts, set GLOO_SOCKET_IFNAME to the network's interface, or mend /etc/hosts"
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return Finding("host name", "warning", f"{name} isn't known: {error.strerror or error}", hint)
    if address.startswith("127.") or address == "::1":
        return Finding("host name", "warning", f"{name} is {address}, which other hosts can't reach", hint)
    return Finding("host name", "good", f"{name} is {address}")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES:
        return Finding("open files", "warning", f"at most {soft:,}", f"ulimit -n {min(hard, 65536)}")
    return Finding("open files", "good", f"at most {soft:,}")


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPUs", "good", "none that torch sees: recipes train on the CPU")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding("GPUs", "good", ", ".join(f"{gpu.name} ({format_bytes(gpu.total_memory)})" for gpu in found))


def _disk(folder: Path) -> Finding:
    """Space, and speed past the system's cache."""
    where = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    stat = os.statvfs(where)
    free, kind = stat.f_bavail * stat.f_frsize, file_system_of(where)
    told = f"{where}: {format_bytes(free)} free, {kind}"
    try:
        written, read = measure_speed(where)
    except (OSError, ConfigError) as error:
        return Finding("disk", "bad", f"{told}; can't be written: {error}", "name another folder with --run-dir")
    told += f", writes {written:.2f} GB/s, reads {read:.2f} GB/s"
    if free < LEAST_DISK_BYTES:
        return Finding("disk", "bad", told, "a checkpoint takes 12 bytes a parameter: free some space")
    if kind in MEMORY_FILE_SYSTEMS:
        return Finding("disk", "warning", told, "what is written here is in memory, and gone with the machine")
    if written < SLOW_GB_PER_SECOND or kind in _NETWORK_FILE_SYSTEMS:
        return Finding("disk", "warning", told, "checkpoints take long to write (training goes on meanwhile)")
    return Finding("disk", "good", told)


MOST_CLOCK_SECONDS = 1.0

_ROUNDS = 20

_LARGE_BYTES = 8 * MIB


def check_hosts(mine: Sequence[Finding]) -> Iterator[Finding]:
    """Of the workers of this program's launcher, who have found `mine` on their own machines: what isn't good on the
    others', then what they have in common. Collective: everyone gets the same. Raises WorkerError."""
    cpu, host = torch.device("cpu"), socket.gethostname()
    group = connect("distributed")
    try:
        wrong = [asdict(finding) for finding in mine if finding.verdict != "good"]
        everyone: list[Any] = all_gather_json(group, [host, numerics_identity(cpu, 1, cpu), wrong], "hosts / control")
        told = {everyone[0][0]}
        for other, _, findings in everyone:
            for finding in findings if other not in told else ():
                yield Finding(f"{other}: {finding['subject']}", finding["verdict"], finding["told"], finding["hint"])
            told.add(other)
        yield _numerics([(other, identity) for other, identity, _ in everyone])
        yield _clocks(group, [other for other, *_ in everyone])
        yield _link(group)
    finally:
        group.close()


def _numerics(everyone: list[Any]) -> Finding:
    """What must be the same everywhere, or the bits wouldn't be."""
    hosts = sorted({host for host, _ in everyone})
    (first_host, first), differing = everyone[0], []
    for host, identity in everyone:
        for name in [*first, *identity]:
            if first.get(name) != identity.get(name):
                differing.append(f"{name}: {first.get(name)} on {first_host}, {identity.get(name)} on {host}")
    told = f"{len(everyone)} workers on {', '.join(hosts)}"
    if differing:
        hint = "use the same version of torch and the same kind of CPU for all workers: a run is refused otherwise"
        return Finding("numerics", "bad", f"{told}; {'; '.join(dict.fromkeys(differing))}", hint)
    return Finding("numerics", "good", f"{told}: the same for all")


def _clocks(group: Group, hosts: list[str]) -> Finding:
    group.barrier("hosts / clock / control")
    times: list[Any] = all_gather_json(group, time.time(), "hosts / clocks / control")
    spread = max(times) - min(times)
    told = f"they differ by {format_seconds(spread)} or less"
    if spread > MOST_CLOCK_SECONDS:
        late = f"{hosts[times.index(max(times))]} is ahead of {hosts[times.index(min(times))]}"
        return Finding(
            "clocks", "warning", f"{told}: {late}", "the run is the same, but times in its events mislead: NTP"
        )
    return Finding("clocks", "good", told)


def _link(group: Group) -> Finding:
    """The time of a small and of a large all-gather."""
    small, large = torch.zeros(1, dtype=torch.uint8), torch.zeros(_LARGE_BYTES, dtype=torch.uint8)
    waits = [_seconds(group, small) for _ in range(_ROUNDS)]
    speed = _LARGE_BYTES * (group.size - 1) / 1e9 / min(_seconds(group, large) for _ in range(3))
    mine = [statistics.median(waits), speed]
    everyone: list[Any] = all_gather_json(group, mine, "hosts / link / control")
    wait, slowest = max(wait for wait, _ in everyone), min(speed for _, speed in everyone)
    return Finding(
        "links", "good", f"{format_seconds(wait)} for a small message to all, {slowest:.2f} GB/s into a worker"
    )


def _seconds(group: Group, tensor: torch.Tensor) -> float:
    began = time.perf_counter()
    group.all_gather_small(tensor, "hosts / probe / control")
    return time.perf_counter() - began
