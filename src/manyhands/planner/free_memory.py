"""How much memory a process could still have."""

from __future__ import annotations

from contextlib import suppress

_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Of control groups, second and first version: what may be used, and what is."""


def free_memory_bytes() -> int:
    """Of the machine's memory, and of what the process's control group may use, as far as the system tells."""
    free = []
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        free.append(next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")))
    for most, now in _LIMITS:
        with (
            suppress(OSError, ValueError),
            open(f"/sys/fs/cgroup/{most}") as limit,
            open(f"/sys/fs/cgroup/{now}") as used,
        ):
            free.append(int(limit.read()) - int(used.read()))
    return max(0, min(free, default=0))
