"""What encoding and decoding the values of a round costs.

    .venv/bin/python benchmarks/islands_codec.py [--values 69400000] [--rounds 5]

For 8, 4 and 2 bits, with one and two threads, in turns: encode one tensor of normal values, encode it with error
feedback, and decode it and add it to a total, as is done with the file of each island. Prints the medians. With two
threads, each operation waits for both of them, so other work on the machine slows it down many times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from manyhands.formatting import format_count
from manyhands.rounds.codec import CODEC_BITS, codes_bytes, decode_add, encode, num_blocks


def seconds(work: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def works(values: torch.Tensor, bits: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name. All memory has been touched before."""
    numel = values.numel()
    codes = torch.zeros(codes_bytes(numel, bits), dtype=torch.uint8)
    scales = torch.zeros(num_blocks(numel), dtype=torch.bfloat16)
    residual, total = torch.zeros(numel), torch.zeros(numel)
    return {
        "encode": lambda: encode(values, bits, codes, scales),
        "encode with error feedback": lambda: encode(values, bits, codes, scales, residual),
        "decode and add": lambda: decode_add(total, codes, scales, bits),
    }


def main() -> None:
    """Measure all cases, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=69_400_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    values = torch.randn(given.values, generator=torch.Generator().manual_seed(0))
    table = Table("bits", "threads", title=f"{format_count(given.values)} values")
    times: dict[tuple[int, int], dict[str, list[float]]] = {}
    for bits in CODEC_BITS:
        cases = works(values, bits)
        for _ in range(given.rounds):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for name, work in cases.items():
                    times.setdefault((bits, threads), {}).setdefault(name, []).append(seconds(work))
    for name in next(iter(times.values())):
        table.add_column(name)
    for (bits, threads), found in sorted(times.items(), key=lambda item: (-item[0][0], item[0][1])):
        table.add_row(str(bits), str(threads), *(f"{median(each):.3f} s" for each in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
