"""A model that does not fit: each worker may use a quarter of its training state, enforced by the kernel.

    .venv/bin/python benchmarks/limit.py [--depth 20] [--scratch DIR]

Creates a control group with a memory limit for every worker (as root, or where control groups are delegated). Trains a
GPT in fp32 whose parameters, gradients and AdamW moments take 16 bytes per parameter, with plain PyTorch, with DDP, and
with Manyhands (zero3, offload to disk). Manyhands also trains it without a limit, to compare the digest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import contenders

HERE = Path(__file__).resolve().parent
WIDTH, VOCABULARY = 1280, 8192
MIB = 2**20
WORKERS = 2


class Limits:
    """A control group with this limit for each worker: `with Limits(bytes) as folder:`. It may be of version 1 or 2."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        first = Path("/sys/fs/cgroup/memory")
        self._is_first = first.is_dir()
        self._folder = (first if self._is_first else Path("/sys/fs/cgroup")) / f"manyhands-limit-{os.getpid()}"

    def __enter__(self) -> Path:
        self._folder.mkdir()
        if not self._is_first:
            (self._folder / "cgroup.subtree_control").write_text("+memory")
        for rank in range(WORKERS):
            (self._folder / str(rank)).mkdir()
            name = "memory.limit_in_bytes" if self._is_first else "memory.max"
            (self._folder / str(rank) / name).write_text(str(self._limit))
        return self._folder

    def peak_mib(self, rank: int) -> float:
        """The peak memory of this worker, including the kernel's cache of its files."""
        name = "memory.max_usage_in_bytes" if self._is_first else "memory.peak"
        return int((self._folder / str(rank) / name).read_text()) / MIB

    def __exit__(self, *_: object) -> None:
        for rank in range(WORKERS):
            (self._folder / str(rank)).rmdir()
        self._folder.rmdir()


def run(kind: str, workers: int, folder: Path | None, options: argparse.Namespace) -> dict[str, object]:
    """Train with one contender. Return its JSON line, or {"failed": how it ended}."""
    words = {f"--{name}": getattr(options, name) for name in ("depth", "length", "steps", "scratch")}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)),
        *(str(HERE / "limited.py"), kind, str(folder or "none")),
        *(str(word) for option in words.items() for word in option),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = contenders.run(command, environment, options.seconds)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    killed = "SIGKILL" in done.stderr or "exitcode  : -9" in done.stderr
    return {"failed": "killed at its memory limit" if killed else done.stderr[-1500:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20, help="blocks of the GPT, 19.7 M parameters each")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sample")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--scratch", default="", help="a folder on a disk (default: a new temporary folder)")
    parser.add_argument("--seconds", type=int, default=1800, help="how long a contender may take")
    options = parser.parse_args()
    contenders.stop_on_signals()
    made = None if options.scratch else tempfile.mkdtemp(prefix="manyhands-")
    options.scratch = options.scratch or made
    parameters = options.depth * (12 * WIDTH**2 + 13 * WIDTH) + WIDTH * (2 * VOCABULARY + options.length + 2)
    limit = parameters * 16 // 4
    console = Console(width=max(130, Console().width))
    console.print(
        f"{parameters / 1e6:.0f} M parameters, {parameters * 16 / MIB:,.0f} MiB of training state; each worker may use "
        f"{limit / MIB:,.0f} MiB",
        highlight=False,
    )
    table = Table("", "workers", "limit", "outcome", "peak MiB", "s/step", "loss", "digest")
    entries = (
        ("plain", 1, True),
        ("ddp", WORKERS, True),
        ("manyhands-zero3-disk", WORKERS, True),
        ("manyhands-zero3-none", 1, False),
    )
    digests = []
    try:
        for kind, workers, limited in entries:
            peaks = ""
            if limited:
                limits = Limits(limit)
                with limits as folder:
                    result = run(kind, workers, folder, options)
                    peaks = " · ".join(f"{limits.peak_mib(rank):,.0f}" for rank in range(workers))
            else:
                result = run(kind, workers, None, options)
            if "failed" in result:
                table.add_row(kind, str(workers), "yes" if limited else "no", str(result["failed"]), peaks)
            else:
                seconds, digest = sorted(result["seconds"])[0], str(result.get("digest", ""))  # type: ignore[call-overload]
                digests += [digest] if digest else []
                row = ("trained", peaks, f"{seconds:.1f}", f"{result['loss']:.4f}", digest[:16])
                table.add_row(kind, str(workers), "yes" if limited else "no", *row)
            console.print(f"{kind}: {result.get('failed', 'trained')}", highlight=False, markup=False)
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    console.print(table)
    equal = len(digests) == 2 and digests[0] == digests[1]
    console.print("the digests are equal" if equal else "[red]the digests are not equal, or one is missing")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
