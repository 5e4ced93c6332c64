"""Islands on slow links: bytes and speed, beside our own DDP and ZeRO, and torchft's DiLoCo.

    .venv/bin/python benchmarks/islands_bandwidth.py [--mbit 100] [--only NAME ...] [--torchft PYTHON]

Each cluster is a network namespace behind a link of 100 Mbit/s in each direction; a server of S3's interface (moto) is
in another namespace without a limit. Needs root. For the model with 69.4 M parameters, a wait takes the place of
computing, because four clusters don't fit on two cores; engine, codec, files, store and links are real. What is left of
the clusters' work still competes for the cores. So the links and the waits of this model are `--slow` times slower, by
default until each cluster has the equivalent of a core, and times are divided by this factor. Then the messages that
clusters send every few seconds are that many times as many, so the bytes of links are also measured at true speed. The
small model is computed, at true speed. Takes about 25 minutes on a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

import contenders

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support.hosts import Host, hosts, torchrun, why_not  # noqa: E402
from support.s3 import BUCKET, VARIABLES  # noqa: E402

WORKER = Path(__file__).with_name("islands_bandwidth_worker.py")
TORCHFT_WORKER = Path(__file__).with_name("islands_torchft_worker.py")
PORT, LIGHTHOUSE_PORT = 5000, 29510
PARAMETERS = 69_386_496
EVERY, DELAY, STEP_SECONDS = 30, 12, 1.2
MOST_SECONDS = 900
SMALL_STEPS = 60

ISLANDS = {"every": EVERY, "bits": 4, "momentum_from": 0}


class Failed(Exception):
    """A contender has failed. The text is the end of its output."""


@dataclass
class Net:
    """The namespaces of one measurement. sent, received: the bytes of each cluster so far."""

    store: Host
    clusters: list[Host]
    folder: Path

    def counters(self) -> list[tuple[int, int]]:
        """Return the bytes that each cluster has sent and received, by its network device."""
        return [(each.bytes_sent, each.bytes_received) for each in self.clusters]

    def run(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list[dict[str, Any]]:
        """Run a command on each cluster, and return what they print as RESULT."""
        logs = [self.folder / f"log-{index}" for index in range(len(commands))]
        for log in logs:
            log.unlink(missing_ok=True)
        started = [
            host.start(command, log, environment)
            for host, command, log in zip(self.clusters, commands, logs, strict=False)
        ]
        deadline = time.monotonic() + MOST_SECONDS
        while any(process.poll() is None for process in started):
            if time.monotonic() > deadline or any(process.poll() for process in started):
                break
            time.sleep(0.2)
        for host in self.clusters:
            host.end()
        found = [_result(log) for log in logs]
        if any(process.returncode for process in started) or None in found:
            raise Failed("\n".join(log.read_text()[-1500:] for log in logs))
        return [each for each in found if each is not None]


def _result(log: Path) -> dict[str, Any] | None:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None


@contextmanager
def net(count: int, mbit: float | None) -> Iterator[Net]:
    """Create `count` clusters and a store, which is the last host, and run a server with an empty bucket there."""
    with tempfile.TemporaryDirectory() as folder, hosts(count + 1) as found:
        *clusters, store = found
        if mbit is not None:
            for host in clusters:
                host.limit(mbit)
        server = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", store.address, "-p", str(PORT)]
        store.start(server, Path(folder) / "store-log")
        create = {"kind": "bucket", "at": f"http://{store.address}:{PORT}/{BUCKET}"}
        if store.start([sys.executable, str(WORKER), json.dumps(create)], Path(folder) / "bucket-log").wait():
            raise Failed((Path(folder) / "bucket-log").read_text()[-1500:])
        yield Net(store, clusters, Path(folder))


def environment(store: Host) -> dict[str, str]:
    """The environment of clusters."""
    paths = [str(TESTS), str(WORKER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **VARIABLES,
        "AWS_ENDPOINT_URL": f"http://{store.address}:{PORT}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def run_islands(
    kind: str,
    count: int,
    mbit: float | None,
    steps: int,
    given: Mapping[str, Any],
    *,
    clusters: int | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Train islands in as many clusters, and return the figures of all clusters, and the bytes of their links."""
    clusters = clusters or count
    with net(clusters, mbit) as found:
        before = found.counters()
        commands = []
        for number in range(clusters):
            options = {
                "kind": kind,
                "at": f"s3://{BUCKET}/run",
                "islands": list(range(number, count, clusters)),
                "steps": steps,
                "count": count,
                "given": dict(given),
                "seconds": seconds,
            }
            commands.append([sys.executable, str(WORKER), json.dumps(options)])
        results = found.run(commands, environment(found.store))
        after = found.counters()
    sent, received = ([b[i] - a[i] for a, b in zip(before, after, strict=True)] for i in (0, 1))
    return {"clusters": results, "sent": sent, "received": received, "steps": steps}


def periods(found: Mapping[str, Any], delay: int) -> list[float]:
    """Return the seconds between the steps before which two successive results must be there, of all clusters.

    So a period has all costs of one round. With a delay, the last round doesn't count: it has none.
    """
    steps = found["steps"]
    needed = [step + delay for step in range(EVERY, steps, EVERY)] + ([] if delay else [steps])
    ends = [cluster["ends"] for cluster in found["clusters"]]
    return [each[b - 1] - each[a - 1] for each in ends for a, b in pairwise(needed)]


def exchanges(found: Mapping[str, Any]) -> list[float]:
    """Return the seconds between the last step of a round and the end of its outer step, without a delay."""
    return [
        each["at"] - cluster["ends"][each["step"] - 1] for cluster in found["clusters"] for each in cluster["rounds"]
    ]


def ring_bytes(parameters: int, count: int) -> float:
    """The bytes that an fp32 ring all-reduce of the gradients sends in a step, and receives in a step, per cluster."""
    return 2 * 4 * (count - 1) / count * parameters


@dataclass
class Case:
    """A run with the large model. slows: whether it is `--slow` times slower. limited: whether the links have a limit.

    chosen: whether it is measured by default.
    """

    name: str
    rounds: int
    slows: bool = True
    delay: int = 0
    compress: bool = False
    limited: bool = True
    chosen: bool = True


CASES = (
    Case("delay 0", 3),
    Case(f"delay {DELAY}", 3, delay=DELAY),
    Case("bytes", 2, slows=False),
    Case("bytes, compressed", 2, slows=False, compress=True),
    Case(f"compressed, delay {DELAY}", 3, compress=True, delay=DELAY, chosen=False),
    Case("unlimited", 2, slows=False, limited=False, chosen=False),
)


def measure_large(case: Case, options: argparse.Namespace, table: Table, console: Console) -> None:
    """Train 4 islands, and add a row to the table. All times are divided by `slow`."""
    given = {**ISLANDS, "delay": case.delay, "compress": case.compress}
    slow, count, steps = options.slow if case.slows else 1.0, options.clusters, EVERY * case.rounds
    mbit = options.mbit / slow if case.limited else None
    found = run_islands("waiting", count, mbit, steps, given, seconds=STEP_SECONDS * slow)
    clusters = found["clusters"]
    ring = ring_bytes(clusters[0]["parameters"], count) * EVERY
    up, down = (
        mean(each["rounds"][-1][name] for each in clusters) / case.rounds for name in ("bytes_up", "bytes_down")
    )
    sent, received = (mean(found[name]) / case.rounds for name in ("sent", "received"))
    seconds = sorted(each / slow for each in periods(found, case.delay))
    whole = [(each["rounds"][-1]["at"] - each["ends"][0]) / slow + STEP_SECONDS for each in clusters]
    table.add_row(
        case.name + (f", {slow:g} times slower" if slow > 1 else ""),
        *(f"{value / 1e6:.2f}" for value in (up, sent, down, received)),
        f"{ring / up:.0f} / {ring / sent:.0f}",
        f"{2 * ring / (up + down):.0f} / {2 * ring / (sent + received):.0f}",
        f"{median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
        f"{EVERY * STEP_SECONDS / median(seconds):.3f}",
        f"{steps * STEP_SECONDS / mean(whole):.3f}",
        "yes" if len({each["digest"] for each in clusters}) == 1 else "NO",
    )
    taken = [(b - a) / slow for each in clusters for a, b in pairwise(each["ends"])]
    waits = [each["seconds_waited"] / slow for cluster in clusters for each in cluster["rounds"][:-1]]
    line = f"{case.name}: a step takes {median(taken):.3f} s, the wait for files {_spread(waits)}"
    if not case.delay:
        line += f" of an exchange of {_spread([each / slow for each in exchanges(found)])}"
    console.print(f"{line}; load {os.getloadavg()[0]:.1f}", highlight=False)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} s ({min(values):.1f} to {max(values):.1f})"


def measure_synchronous(options: argparse.Namespace, console: Console) -> None:
    """Make some steps of the large model with our own DDP and ZeRO on two hosts, and print a table."""
    given = {"kind": "synchronous", "steps": 2, "count": 2, "seconds": STEP_SECONDS, "shardings": options.shardings}
    with net(2, options.mbit) as found:
        command = torchrun(found.clusters, 1, [str(WORKER), json.dumps(given)])
        results = found.run([command, command], environment(found.store))
    ring = ring_bytes(PARAMETERS, 2)
    table = Table("2 hosts", "sent, MB a step", "received, MB", "fp32 ring, MB", "s a step", "of unlimited")
    for sharding in options.shardings:
        seconds, sent, received = (mean(result[sharding][-1][i] for result in results) for i in range(3))
        figures = (f"{sent / 1e6:.1f}", f"{received / 1e6:.1f}", f"{ring / 1e6:.1f}", f"{seconds:.1f}")
        table.add_row(sharding, *figures, f"{STEP_SECONDS / seconds:.3f}")
    console.print(table)


def measure_codec(options: argparse.Namespace, console: Console) -> None:
    """Measure what a round costs a cluster besides the exchange."""
    given = {"kind": "codec", "count": options.clusters, "steps": 4 * EVERY, "given": ISLANDS}
    command = [sys.executable, str(WORKER), json.dumps(given)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "2"}
    done = contenders.run(command, environment, MOST_SECONDS)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise Failed(done.stderr[-1500:])
    found = json.loads(line.removeprefix("RESULT "))
    for threads, parts in found.items():
        for name, values in parts.items():
            shown = f"{values[0]:.2f} s (fastest {values[1]:.2f} s), {values[2]:.2f} s of CPU time"
            console.print(f"codec, {threads} threads, {options.clusters} islands: {name} {shown}", highlight=False)


def measure_small(options: argparse.Namespace, console: Console) -> None:
    """Train the small model, which is computed, with several contenders, and print a table."""
    table = Table("2 clusters, small model", "s", "sent, MB", "received, MB", "validation loss", "digest")
    steps = SMALL_STEPS

    def add(name: str, found: Mapping[str, Any]) -> None:
        results = found["clusters"]
        digests = sorted({each["digest"][:8] for each in results})
        seconds = max(each["ends"][-1] - each["ends"][0] for each in results if each["ends"])  # of first workers
        moved = (f"{mean(found[way]) / 1e6:.2f}" for way in ("sent", "received"))
        table.add_row(name, f"{seconds:.0f}", *moved, f"{results[0]['loss']:.4f}", ", ".join(digests))

    given = {"every": EVERY, "bits": 4}
    add("islands, 4 bits", run_islands("computing", 2, options.mbit, steps, given))
    add("the same, in one cluster", run_islands("computing", 2, options.mbit, steps, given, clusters=1))
    add("the same, and a state after each round", run_islands("publishing", 2, options.mbit, steps, given))
    with net(2, options.mbit) as found:
        given = {"kind": "computing", "steps": steps, "count": 2}
        command = torchrun(found.clusters, 1, [str(WORKER), json.dumps(given)])
        before = found.counters()
        results = found.run([command, command], environment(found.store))
        add("our DDP", _between(before, found.counters(), results))
    python, why = _torchft(options.torchft)
    if why:
        console.print(f"torchft is left out: {why}", highlight=False)
    else:
        for replicas in (2, 1):
            name = f"torchft's DiLoCo, 32 bits, {replicas} replica{'s' * (replicas > 1)}"
            try:
                add(name, _run_torchft(python, replicas, options.mbit))
            except Failed as error:
                console.print(f"{name} failed: {error}", highlight=False, markup=False)
    console.print(table)


def _run_torchft(python: str, replicas: int, mbit: float) -> dict[str, Any]:
    """Train the small model with torchft. The server by which replicas find each other is where our store is."""
    script = [python, str(TORCHFT_WORKER)]
    with net(replicas, mbit) as found:
        lighthouse = found.store.start([*script, "lighthouse", str(replicas)], found.folder / "lighthouse-log")
        before, commands = found.counters(), []
        for rank, cluster in enumerate(found.clusters):
            given = {"rank": rank, "replicas": replicas, "steps": SMALL_STEPS, "every": EVERY}
            given |= {"address": cluster.address, "lighthouse": f"http://{found.store.address}:{LIGHTHOUSE_PORT}"}
            commands.append([*script, json.dumps(given)])
        results = found.run(commands, {**environment(found.store), "GLOO_SOCKET_IFNAME": "eth0"})
        lighthouse.kill()
        return _between(before, found.counters(), results)


def _between(before: Any, after: Any, results: Any) -> dict[str, Any]:
    sent, received = ([b[i] - a[i] for a, b in zip(before, after, strict=True)] for i in (0, 1))
    return {"clusters": results, "sent": sent, "received": received}


def _torchft(given: str) -> tuple[str, str]:
    """Return a Python with torchft, and why there is none."""
    python = given or sys.executable
    done = contenders.run([python, "-c", "import torchft"], dict(os.environ), 120)
    return python, "" if done.returncode == 0 else f"{python} can't import it; give another one with --torchft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument(
        "--slow",
        type=float,
        default=max(1.0, 4 / (os.cpu_count() or 1)),
        help="run waits and links of the large model so many times slower, and divide the times again, because the "
        "clusters share this machine's cores (default: clusters / cores)",
    )
    parser.add_argument("--mbit", type=float, default=100.0, help="the rate of each link, in each direction")
    parser.add_argument("--shardings", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--torchft", default="", help="a Python interpreter that can import torchft")
    others = ["synchronous", "codec", "small"]
    names = [*(case.name for case in CASES), *others]
    default = [*(case.name for case in CASES if case.chosen), *others]
    parser.add_argument("--only", nargs="+", default=default, choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    if why_not():
        sys.exit(why_not())
    contenders.stop_on_signals()
    console = Console(width=max(170, Console().width))
    table = Table(
        "islands",
        "sent: files, MB",
        "link, MB",
        "received: files, MB",
        "link, MB",
        "ring / sent",
        "ring / both",
        "s a round",
        "of unlimited",
        "whole run",
        "one digest",
        title=f"{options.clusters} clusters, {options.mbit:g} Mbit/s, {EVERY} steps of {STEP_SECONDS} s, 4 bits",
    )
    for case in CASES:
        if case.name in options.only:
            measure_large(case, options, table, console)
    if table.row_count:
        console.print(table)
    for name, measure in (("codec", measure_codec), ("synchronous", measure_synchronous), ("small", measure_small)):
        if name in options.only:
            measure(options, console)


if __name__ == "__main__":
    main()
