"""What several machines have in common, and how far they are apart: looked at together before a run."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from manyhands.comm.connect import connect
from manyhands.comm.group import Group
from manyhands.engine.control import gather_json
from manyhands.numerics.identity import numerics_identity
from manyhands.planner.machine import Finding
from manyhands.units import MIB, format_seconds

MOST_CLOCK_SECONDS = 1.0
_ROUNDS = 20
_LARGE_BYTES = 8 * MIB


def look_at_hosts(mine: Sequence[Finding]) -> Iterator[Finding]:
    """Of the workers of this program's launcher, who have found `mine` on their own machines: what isn't good on the
    others', then what they have in common. Collective: everyone gets the same. Raises WorkerError."""
    cpu, host = torch.device("cpu"), socket.gethostname()
    group = connect("process")
    try:
        wrong = [asdict(finding) for finding in mine if finding.verdict != "good"]
        everyone: list[Any] = gather_json(group, [host, numerics_identity(cpu, 1, cpu), wrong], "hosts / control")
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
    times: list[Any] = gather_json(group, time.time(), "hosts / clocks / control")
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
    everyone: list[Any] = gather_json(group, mine, "hosts / link / control")
    wait, slowest = max(wait for wait, _ in everyone), min(speed for _, speed in everyone)
    return Finding(
        "links", "good", f"{format_seconds(wait)} for a small message to all, {slowest:.2f} GB/s into a worker"
    )


def _seconds(group: Group, tensor: torch.Tensor) -> float:
    began = time.perf_counter()
    group.gather(tensor, "hosts / probe / control")
    return time.perf_counter() - began
