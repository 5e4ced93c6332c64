"""Value at risk and expected shortfall of a book of options, by Monte Carlo simulation.

    python examples/risk/risk.py --paths 4194304 --workers 2 --out runs/risk

Paths are simulated in blocks. The random numbers of a block depend only on the seed and the block's number, not on the
worker that draws them. All losses are sorted, so the quantile is exact, and sums are rounded once (math.fsum). So the
results have the same digits for any number of workers. The output folder holds the sorted losses and a picture. The
same command resumes a killed run.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import manyhands as mh

sys.path.insert(0, str(Path(__file__).resolve().parent))
from book import EXAMPLE, Array, Book

BLOCK_PATHS = 2**16
TRADING_DAYS = 252


@dataclass(frozen=True)
class Risk:
    """The risk of a book, in units of currency.

    var: the value at risk, which is the loss that a fraction `level` of all paths does not exceed. shortfall: the mean
    of the losses beyond the value at risk. var_error, shortfall_error: the standard errors of these numbers.
    """

    level: float
    paths: int
    var: float
    var_error: float
    shortfall: float
    shortfall_error: float

    def __str__(self) -> str:
        return (
            f"{self.level:.1%} of {self.paths:,} paths: value at risk {self.var:,.2f} ± {self.var_error:,.2f}, "
            f"expected shortfall {self.shortfall:,.2f} ± {self.shortfall_error:,.2f}"
        )


def losses_of(book: Book, days: int, seed: int) -> Callable[[Any], dict[str, Array]]:
    """Return a function for `map_batches` that simulates the losses of blocks of paths over `days` trading days."""
    years = days / TRADING_DAYS
    roots = np.linalg.cholesky(np.array(book.correlation)).tolist()
    before = book.value_today()

    def losses(blocks: Any) -> dict[str, Array]:
        found = []
        for block in blocks["block"].tolist():
            draws = np.random.Generator(np.random.Philox(key=[seed, block]))
            normals = draws.standard_normal((len(book.stocks), BLOCK_PATHS))
            prices = []
            for stock, factors in zip(book.stocks, roots, strict=True):
                shock = np.zeros(BLOCK_PATHS)
                for factor, normal in zip(factors, normals, strict=True):
                    shock += factor * normal
                growth = (stock.drift - stock.volatility**2 / 2) * years
                prices.append(stock.price * np.exp(growth + stock.volatility * math.sqrt(years) * shock))
            found.append(before - book.value(prices, years))
        return {"loss": np.concatenate(found)}

    return losses


def simulate(book: Book, folder: str, *, paths: int, days: int = 10, seed: int = 0, **how: Any) -> mh.PrepareSummary:
    """Write all losses, largest first, as Parquet files in `folder`/ordered. `paths` is rounded up to full blocks."""
    blocks = [{"block": block} for block in range(-(-paths // BLOCK_PATHS))]
    simulated = mh.Dataset.from_records(blocks, partition_bytes=1).map_batches(
        losses_of(book, days, seed), form="numpy"
    )
    simulated.write(os.path.join(folder, "losses"), format="parquet", overwrite=True, **how)
    ordered = mh.Dataset.read(os.path.join(folder, "losses")).sort_by("loss", descending=True)
    return ordered.write(os.path.join(folder, "ordered"), format="parquet", overwrite=True, **how)


def largest_losses(summary: mh.PrepareSummary, count: int) -> list[float]:
    """Return the largest losses. Reads only the first files, because losses are sorted."""
    found: list[float] = []
    for name in summary.files:
        if len(found) >= count:
            break
        found += pq.read_table(os.path.join(summary.path, name)).column("loss").to_pylist()
    return found[:count]


def risk_of(summary: mh.PrepareSummary, level: float) -> Risk:
    """Compute value at risk and expected shortfall from the losses beyond the quantile and some before it."""
    paths = summary.records
    beyond = max(1, round((1 - level) * paths))
    around = 3 * math.isqrt(beyond)  # the order statistics within this distance bound the quantile
    tail = largest_losses(summary, min(paths, beyond + around))
    worst = tail[:beyond]
    mean = math.fsum(worst) / beyond
    variance = math.fsum((loss - mean) ** 2 for loss in worst) / beyond
    var = worst[-1]
    var_error = (
        tail[max(0, beyond - math.isqrt(beyond) - 1)] - tail[min(len(tail), beyond + math.isqrt(beyond)) - 1]
    ) / 2
    shortfall_error = math.sqrt((variance + level * (mean - var) ** 2) / beyond)
    return Risk(level, paths, var, var_error, mean, shortfall_error)


def draw(summary: mh.PrepareSummary, risks: list[Risk], path: str) -> None:
    """Draw a histogram of all losses with the quantiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    losses = pq.read_table(summary.path, columns=["loss"]).column("loss").to_numpy()
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    low, high = np.quantile(losses, [0.0002, 0.9999])
    bins = np.linspace(low, high, 160)
    _, _, bars = axes.hist(losses, bins=bins, color="#9fb8cf")
    for risk, color, height in zip(risks, ("#c06020", "#8a1c1c"), (0.92, 0.72), strict=False):
        for bar, start in zip(bars, bins, strict=False):
            if start >= risk.var:
                bar.set_facecolor(color)
        axes.axvline(risk.var, ymax=height, color=color, linewidth=1.2)
        text = f"{risk.level:.1%}\nvalue at risk {risk.var:,.0f}\nexpected shortfall {risk.shortfall:,.0f}"
        axes.text(
            risk.var,
            height,
            " " + text.replace("\n", "\n "),
            color=color,
            va="top",
            fontsize=9,
            transform=axes.get_xaxis_transform(),
        )
    axes.set(xlabel="loss over ten days", ylabel="paths per bin", yticks=[])
    axes.set_title(f"Losses of an option book on {summary.records:,} paths", loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=2**22)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--engine", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/risk")
    options = parser.parse_args()
    how = {"workers": options.workers, "engine": options.engine}
    summary = simulate(EXAMPLE, options.out, paths=options.paths, seed=options.seed, **how)
    risks = [risk_of(summary, level) for level in (0.975, 0.99)]
    print(f"the book is worth {EXAMPLE.value_today():,.2f}")
    for risk in risks:
        print(risk)
    print(f"digest of all losses: {summary.digest}")
    try:
        draw(summary, risks, os.path.join(options.out, "losses.png"))
    except ImportError:
        print("no picture was drawn, because matplotlib is not installed: pip install matplotlib")


if __name__ == "__main__":
    main()
