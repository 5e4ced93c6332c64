"""What a machine has for a run, and what would fail on it: looked at before anything is started."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manyhands.errors import ConfigError
from manyhands.offload.scratch import MEMORY_FILE_SYSTEMS, file_system_of, measure_speed
from manyhands.planner.free_memory import free_memory_bytes
from manyhands.units import GIB, format_bytes

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


def look_at_machine(folder: Path) -> Iterator[Finding]:
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
    from manyhands.numerics.identity import bf16_instructions  # which loads torch

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
        return Finding(subject, "warning", "this system has no memfd_create", "use one worker, or group = 'process'")
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
        "mount /proc without hidepid, or use --group process",
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
