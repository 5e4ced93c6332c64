"""Checks one machine, or several machines together, before a run.

On one machine, it checks the resources that a run needs. On several machines, under a launcher, it also looks for
differences that would stop a run, and measures the speed of the network.
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

from manyhands.comm.agreement import all_gather_json
from manyhands.comm.connect import connect
from manyhands.comm.group import Group
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
    """The result of one check.

    verdict: "bad" if runs will fail, "warning" if they may fail or be slow. hint: what to do.
    """

    subject: str
    verdict: Verdict
    message: str
    hint: str | None = None


def check_machine(folder: Path) -> Iterator[Finding]:
    """Run all checks and yield their findings. The last check takes a second. folder: the folder of future runs."""
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

    message = (
        f"manyhands {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    if not sys.platform.startswith("linux"):
        return Finding("versions", "warning", message, "several workers need Linux; a single worker runs here")
    return Finding("versions", "good", message)


def _cpus() -> Finding:
    from manyhands.numerics.arithmetic import bf16_instructions  # imported here, because it loads torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    message = f"{usable} of {os.cpu_count()} available to this process, load {load:.1f}"
    message += f", bf16 instructions: {bf16_instructions()}" if bf16_instructions() else ", bf16 is emulated"
    quota = _cpu_quota()
    if quota is not None and quota < usable:
        message += f", limited to {quota:g} by its control group"
        return Finding(
            "CPUs", "warning", message, f"use at most {max(1, int(quota))} threads in total (workers x threads each)"
        )
    if load > usable / 2:
        return Finding(
            "CPUs", "warning", message, "end other programs that use these CPUs: steps wait for the slowest worker"
        )
    return Finding("CPUs", "good", message)


def _cpu_quota() -> float | None:
    """Return the number of CPUs that the control group may use, or None if there is no limit."""
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
    message = f"{format_bytes(free)} free of {format_bytes(total)}"
    if free < LEAST_MEMORY_BYTES:
        return Finding("memory", "bad", message, "torch alone takes about 400 MiB per worker: end other programs")
    return Finding("memory", "good", message)


_CHILD = "import mmap, os, sys; mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)[:5] = b'hello'"


def _shared_memory() -> Finding:
    """Check that another process can map this process's memory, as workers do."""
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
            return Finding(subject, "good", "workers can map each other's memory")
    finally:
        os.close(fd)
    errors = child.stderr.strip().splitlines()
    reason = errors[-1] if errors else "the other process's write was not visible"
    return Finding(
        subject,
        "bad",
        f"a process can't map the memory of another: {reason}",
        "mount /proc without hidepid, or use --transport distributed",
    )


def _watching() -> Finding:
    """Check that workers can detect the end of another worker."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return Finding(
            "watching",
            "bad",
            f"pidfd_open fails: {error}",
            "use Linux 5.3 or newer, and allow pidfd_open in the seccomp profile",
        )
    return Finding("watching", "good", "a process can detect the end of another process")


def _ports() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            return Finding("ports", "good", "a process can listen on a port of 127.0.0.1 and be reached there")
    except OSError as error:
        return Finding(
            "ports",
            "bad",
            f"a process can't listen on a port of 127.0.0.1 or can't be reached there: {error}",
            "check the firewall",
        )


def _host_name() -> Finding:
    """Check the host's name. Gloo, which torch.distributed uses, binds to the address that the name resolves to."""
    name = socket.gethostname()
    hint = "for workers on several hosts, set GLOO_SOCKET_IFNAME to the network's interface, or correct /etc/hosts"
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return Finding("host name", "warning", f"{name} can't be resolved: {error.strerror or error}", hint)
    if address.startswith("127.") or address == "::1":
        return Finding("host name", "warning", f"{name} resolves to {address}, which other hosts can't reach", hint)
    return Finding("host name", "good", f"{name} resolves to {address}")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_FILES:
        return Finding("open files", "warning", f"at most {soft:,}", f"raise the limit: ulimit -n {min(hard, 65536)}")
    return Finding("open files", "good", f"at most {soft:,}")


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPUs", "good", "torch finds no GPU: recipes train on the CPU")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding("GPUs", "good", ", ".join(f"{gpu.name} ({format_bytes(gpu.total_memory)})" for gpu in found))


def _disk(folder: Path) -> Finding:
    """Check the folder's free space, and its speed without the page cache."""
    where = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    stat = os.statvfs(where)
    free, kind = stat.f_bavail * stat.f_frsize, file_system_of(where)
    message = f"{where}: {format_bytes(free)} free, {kind}"
    try:
        written, read = measure_speed(where)
    except (OSError, ConfigError) as error:
        return Finding("disk", "bad", f"{message}; it isn't writable: {error}", "choose another folder with --run-dir")
    message += f", writes {written:.2f} GB/s, reads {read:.2f} GB/s"
    if free < LEAST_DISK_BYTES:
        return Finding("disk", "bad", message, "a checkpoint takes 12 bytes per parameter: free some space")
    if kind in MEMORY_FILE_SYSTEMS:
        return Finding("disk", "warning", message, "this file system is in memory: a restart of the machine deletes it")
    if written < SLOW_GB_PER_SECOND or kind in _NETWORK_FILE_SYSTEMS:
        return Finding("disk", "warning", message, "checkpoints take long to write (training continues)")
    return Finding("disk", "good", message)


MOST_CLOCK_SECONDS = 1.0

_ROUNDS = 20

_LARGE_BYTES = 8 * MIB


def check_hosts(mine: Sequence[Finding]) -> Iterator[Finding]:
    """Compare the machines of all workers that the launcher started. Collective: all workers yield the same findings.

    mine: this worker's findings about its own machine. First yields the bad findings and warnings of the other
    machines, then the results of the comparison. Raises WorkerError.
    """
    cpu, host = torch.device("cpu"), socket.gethostname()
    group = connect("distributed")
    try:
        wrong = [asdict(finding) for finding in mine if finding.verdict != "good"]
        all_ranks: list[Any] = all_gather_json(group, [host, numerics_identity(cpu, 1, cpu), wrong], "hosts / control")
        reported = {all_ranks[0][0]}
        for other, _, findings in all_ranks:
            for finding in findings if other not in reported else ():
                yield Finding(f"{other}: {finding['subject']}", finding["verdict"], finding["message"], finding["hint"])
            reported.add(other)
        yield _numerics([(other, identity) for other, identity, _ in all_ranks])
        yield _clocks(group, [other for other, *_ in all_ranks])
        yield _link(group)
    finally:
        group.close()


def _numerics(identities: list[tuple[str, dict[str, str]]]) -> Finding:
    """Check that all workers have the same numerics identity, without which their bits would differ."""
    hosts = sorted({host for host, _ in identities})
    (first_host, first), differing = identities[0], []
    for host, identity in identities:
        for name in [*first, *identity]:
            if first.get(name) != identity.get(name):
                differing.append(f"{name}: {first.get(name)} on {first_host}, {identity.get(name)} on {host}")
    message = f"{len(identities)} workers on {', '.join(hosts)}"
    if differing:
        hint = "use the same version of torch and the same kind of CPU for all workers: otherwise a run is refused"
        return Finding("numerics", "bad", f"{message}; {'; '.join(dict.fromkeys(differing))}", hint)
    return Finding("numerics", "good", f"{message}: all have the same numerics")


def _clocks(group: Group, hosts: list[str]) -> Finding:
    group.barrier("hosts / clock / control")
    times: list[Any] = all_gather_json(group, time.time(), "hosts / clocks / control")
    spread = max(times) - min(times)
    message = f"the clocks differ by at most {format_seconds(spread)}"
    if spread > MOST_CLOCK_SECONDS:
        late = f"{hosts[times.index(max(times))]} is ahead of {hosts[times.index(min(times))]}"
        return Finding(
            "clocks",
            "warning",
            f"{message}: {late}",
            "results are not affected, but the times of events are misleading: set up NTP",
        )
    return Finding("clocks", "good", message)


def _link(group: Group) -> Finding:
    """Measure the time of a small and of a large all-gather."""
    small, large = torch.zeros(1, dtype=torch.uint8), torch.zeros(_LARGE_BYTES, dtype=torch.uint8)
    waits = [_seconds(group, small) for _ in range(_ROUNDS)]
    speed = _LARGE_BYTES * (group.size - 1) / 1e9 / min(_seconds(group, large) for _ in range(3))
    mine = [statistics.median(waits), speed]
    all_ranks: list[Any] = all_gather_json(group, mine, "hosts / link / control")
    wait, slowest = max(wait for wait, _ in all_ranks), min(speed for _, speed in all_ranks)
    return Finding(
        "links", "good", f"{format_seconds(wait)} for a small message to all workers, {slowest:.2f} GB/s into a worker"
    )


def _seconds(group: Group, tensor: torch.Tensor) -> float:
    started = time.perf_counter()
    group.all_gather_small(tensor, "hosts / probe / control")
    return time.perf_counter() - started
