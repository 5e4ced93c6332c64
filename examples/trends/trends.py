"""Finds words that become more frequent: counts words by time window, even while posts arrive.

    python examples/trends/trends.py batch  INBOX OUT    # counts all files in INBOX
    python examples/trends/trends.py follow INBOX OUT    # also counts files that arrive, until it is stopped
    python examples/trends/trends.py sample INBOX        # writes sample posts

A post is a line of JSON with `time` (seconds) and `text`. Move complete files into INBOX with a rename. Names that
start with a dot are ignored. `follow` counts each file exactly once, however often it is killed (even with kill -9):

    OUT/batches/00007.json   the files of batch 7; written before they are counted, so that the batch never changes
    OUT/counts/00007         the counts of batch 7; if the job is killed, it is repeated with the same bytes
    OUT/totals/00007         the totals of batches 0 to 7: totals of 6 + counts of 7

After a kill, `follow` resumes at the first batch without totals. Late posts count in the window of their own time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import manyhands as mh

WINDOW_SECONDS = 3600
WORD = re.compile(r"[a-z]{3,}")


def windowed_words(posts: mh.Dataset) -> mh.Dataset:
    """Count words by window: records {"window", "word", "count"}, sorted. `window` is the first second of a window."""

    def words(post: dict[str, Any]) -> list[dict[str, Any]]:
        window = int(post["time"]) // WINDOW_SECONDS * WINDOW_SECONDS
        return [{"window": window, "word": word} for word in WORD.findall(post["text"].lower())]

    return posts.flat_map(words).group_by(["window", "word"]).aggregate(count=mh.Aggregate.count())


def rising(counts: mh.Dataset, window: int, *, most: int = 10, **how: Any) -> list[dict[str, Any]]:
    """Return the words that rise most in `window`: {"word", "count", "before", "score"}, the highest score first.

    before: the mean count in earlier windows. score: the number of standard deviations by which the count exceeds that
    mean, if words occur at random (Poisson). One is added to the variance, so that rare words do not dominate.
    """
    windows = max(1, len({row["window"] for row in counts.take(10**9, **how) if row["window"] < window}))

    def scored(row: dict[str, Any]) -> dict[str, Any]:
        count = sum(n for at, n in row["seen"] if at == window)
        before = sum(n for at, n in row["seen"] if at < window) / windows
        return {"word": row["word"], "count": count, "before": before, "score": (count - before) / (before + 1) ** 0.5}

    seen = counts.map(lambda row: {"word": row["word"], "seen": (row["window"], row["count"])})
    by_word = seen.group_by("word").aggregate(seen=mh.Aggregate.collect(of="seen"))
    return by_word.map(scored).sort_by("score", descending=True).take(most, **how)


def follow(inbox: str, out: str, *, rounds: int | None = None, pause_seconds: float = 1.0, **how: Any) -> None:
    """Count files as they arrive. rounds: stop after this many checks without new files (None: never stop)."""
    folder = Path(out)
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    number = 0
    while rounds is None or rounds > 0:
        batch = folder / "batches" / f"{number:05d}.json"
        if not batch.exists() and not write_batch(Path(inbox), batch):
            rounds = None if rounds is None else rounds - 1
            time.sleep(pause_seconds)
            continue
        count_batch(inbox, folder, number, **how)
        number += 1


def write_batch(inbox: Path, batch: Path) -> bool:
    """Write the list of files of the next batch: all files not in an earlier batch. Return False if there are none."""
    taken = {name for earlier in batch.parent.glob("*.json") for name in json.loads(earlier.read_text())}
    new = sorted(path.name for path in inbox.iterdir() if not path.name.startswith(".") and path.name not in taken)
    if new:
        temporary = batch.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(new, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(batch)
    return bool(new)


def count_batch(inbox: str, folder: Path, number: int, **how: Any) -> None:
    """Count a batch and add it to the totals, unless its totals exist. If this is killed, it can be repeated."""
    counts, totals = folder / "counts" / f"{number:05d}", folder / "totals" / f"{number:05d}"
    before = folder / "totals" / f"{number - 1:05d}"
    if not is_complete(totals):
        names = json.loads((folder / "batches" / f"{number:05d}.json").read_text())
        posts = mh.Dataset.read([os.path.join(inbox, name) for name in names])
        windowed_words(posts).write(str(counts), overwrite=True, **how)
        parts = [str(counts), *([str(before)] if number else [])]
        added = mh.Dataset.read(parts).group_by(["window", "word"]).aggregate(count=mh.Aggregate.sum(of="count"))
        added.write(str(totals), overwrite=True, **how)
        print(f"batch {number}: {len(names)} files", flush=True)
    for older in (folder / "totals").glob("*"):
        if older.name < before.name:  # the last two stay, so that a process that reads the older one can finish
            shutil.rmtree(older)


def is_complete(output: Path) -> bool:
    """True if the output is complete: its manifest exists, and the job folder has been removed."""
    return (output / "_manifest.json").exists() and not (output / ".manyhands").exists()


def totals_of(out: str) -> mh.Dataset:
    """Return the latest complete totals."""
    return mh.Dataset.read(str(max(path for path in (Path(out) / "totals").iterdir() if is_complete(path))))


def sample(inbox: str, *, files: int = 24, posts: int = 400, seed: int = 0) -> None:
    """Write the posts of one day, one file per hour. The word "aurora" rises in the evening."""
    chance = random.Random(seed)
    syllables = ["ba", "do", "ke", "li", "mu", "na", "po", "ri", "su", "ta", "ve", "zo"]
    words = ["".join(chance.choices(syllables, k=chance.randint(2, 3))) for _ in range(800)]
    Path(inbox).mkdir(parents=True, exist_ok=True)
    for hour in range(files):
        lines = []
        for _ in range(posts):
            text = [words[int(chance.paretovariate(0.6)) % len(words)] for _ in range(12)]
            if chance.random() < max(0.004, 0.05 * (hour - files + 6)):
                text.append("aurora")
            second = hour * WINDOW_SECONDS + chance.randrange(WINDOW_SECONDS)
            lines.append(json.dumps({"time": second, "text": " ".join(text)}) + "\n")
        temporary = Path(inbox) / f".hour-{hour:02d}.jsonl"
        temporary.write_text("".join(lines))
        temporary.rename(Path(inbox) / f"hour-{hour:02d}.jsonl")


def draw(counts: mh.Dataset, words: list[str], path: str, **how: Any) -> None:
    """Draw the counts of `words` by window."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = counts.filter(lambda row: row["word"] in words).take(10**9, **how)
    windows = sorted({row["window"] for row in rows})
    found = {(row["window"], row["word"]): row["count"] for row in rows}
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    lines = [[found.get((window, word), 0) for window in windows] for word in words]
    gap, free = max(map(max, lines)) / 22, 0.0  # keeps labels apart; the lowest is placed first
    for rank in sorted(range(len(words)), key=lambda rank: lines[rank][-1]):
        color, width = ("#c06020", 2.4) if rank == 0 else ("#7d9ab5", 1.2)
        axes.plot([window / 3600 for window in windows], lines[rank], color=color, linewidth=width)
        height = max(free, lines[rank][-1])
        axes.text(windows[-1] / 3600 + 0.3, height, words[rank], va="center", fontsize=9, color=color)
        free = height + gap
    axes.set(xlabel="hour", ylabel="occurrences per hour", ylim=(0, None))
    axes.set_title(f"Words that rose most in the last hour, “{words[0]}” first", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(counts: mh.Dataset, picture: str, **how: Any) -> None:
    """Print and draw the words that rise most in the last window."""
    window = max(row["window"] for row in counts.take(10**9, **how))
    found = rising(counts, window, **how)
    for row in found:
        print(f"{row['word']:>12}  {row['count']:>6} now, {row['before']:8.2f} before, score {row['score']:6.2f}")
    try:
        draw(counts, [row["word"] for row in found[:5]], picture, **how)
    except ImportError:
        print("no picture was drawn, because matplotlib is not installed: pip install matplotlib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["batch", "follow", "report", "sample"])
    parser.add_argument("inbox")
    parser.add_argument("out", nargs="?", default="runs/trends")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="follow: stop after ROUNDS checks without new files")
    options = parser.parse_args()
    how = {"workers": options.workers}
    if options.command == "sample":
        sample(options.inbox)
    elif options.command == "follow":
        follow(options.inbox, options.out, rounds=options.rounds, pause_seconds=0.2, **how)
    elif options.command == "report":
        report(totals_of(options.out), os.path.join(options.out, "rising.png"), **how)
    else:
        counts = os.path.join(options.out, "all")
        windowed_words(mh.Dataset.read(options.inbox)).write(counts, overwrite=True, **how)
        report(mh.Dataset.read(counts), os.path.join(options.out, "rising.png"), **how)


if __name__ == "__main__":
    main()
