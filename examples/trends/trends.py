"""Which words are on the rise? Posts are counted by word and window of time; also while they still arrive.

    python examples/trends/trends.py batch  INBOX OUT    # what is there, at once
    python examples/trends/trends.py follow INBOX OUT    # and what arrives, until it's stopped
    python examples/trends/trends.py sample INBOX        # makes posts to try it with

A post is a line of JSON with `time` (seconds) and `text`. Files are put into INBOX by a rename, whole; names that begin
with a dot are let be. `follow` takes each file in exactly once, however often it's killed (kill -9 included):

    OUT/batches/00007.json   which files batch 7 has: written before it's counted, so that a batch once cut stays so
    OUT/counts/00007         their counts; made by a job that is repeated with the same bytes if it was killed
    OUT/totals/00007         those of all batches so far: totals of 6 + counts of 7

What was killed is begun again at the first batch without totals. Late posts count in the window of their own time.
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
    """{"window", "word", "count"} of posts, in order. Windows are named by the second in which they begin."""

    def words(post: dict[str, Any]) -> list[dict[str, Any]]:
        window = int(post["time"]) // WINDOW_SECONDS * WINDOW_SECONDS
        return [{"window": window, "word": word} for word in WORD.findall(post["text"].lower())]

    return posts.flat_map(words).group_by(["window", "word"]).aggregate(count=mh.Aggregate.count())


def rising(counts: mh.Dataset, window: int, *, most: int = 10, **how: Any) -> list[dict[str, Any]]:
    """The words that have risen most in `window`: {"word", "count", "before", "score"}, the highest score first.

    before: the mean of the earlier windows. score: by how many standard deviations the count is above it, as if words
    came at random (Poisson), with one more to steady rare words.
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
    """Take in files as they arrive. rounds: how often to look (None: for ever)."""
    folder = Path(out)
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    number = 0
    while rounds is None or rounds > 0:
        batch = folder / "batches" / f"{number:05d}.json"
        if not batch.exists() and not cut_batch(Path(inbox), batch):
            rounds = None if rounds is None else rounds - 1
            time.sleep(pause_seconds)
            continue
        take_in(inbox, folder, number, **how)
        number += 1


def cut_batch(inbox: Path, batch: Path) -> bool:
    """Decide which files the next batch has: all that no earlier one has. Whether there are any."""
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


def take_in(inbox: str, folder: Path, number: int, **how: Any) -> None:
    """Count a batch and add it to the totals, unless that was done. Killed anywhere, it is only repeated."""
    counts, totals = folder / "counts" / f"{number:05d}", folder / "totals" / f"{number:05d}"
    before = folder / "totals" / f"{number - 1:05d}"
    if not is_whole(totals):
        names = json.loads((folder / "batches" / f"{number:05d}.json").read_text())
        posts = mh.Dataset.read([os.path.join(inbox, name) for name in names])
        windowed_words(posts).write(str(counts), overwrite=True, **how)
        parts = [str(counts), *([str(before)] if number else [])]
        added = mh.Dataset.read(parts).group_by(["window", "word"]).aggregate(count=mh.Aggregate.sum(of="count"))
        added.write(str(totals), overwrite=True, **how)
        print(f"batch {number}: {len(names)} files", flush=True)
    for older in (folder / "totals").glob("*"):
        if older.name < before.name:  # the last two stay: whoever reads one has time to
            shutil.rmtree(older)


def is_whole(output: Path) -> bool:
    """The manifest is written last, and the job's folder is removed after it."""
    return (output / "_manifest.json").exists() and not (output / ".manyhands").exists()


def totals_of(out: str) -> mh.Dataset:
    """The latest totals that are whole."""
    return mh.Dataset.read(str(max(path for path in (Path(out) / "totals").iterdir() if is_whole(path))))


def sample(inbox: str, *, files: int = 24, posts: int = 400, seed: int = 0) -> None:
    """Posts of a day, a file an hour, among whose words "aurora" rises in the evening."""
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
    """A picture of these words' counts by window."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = counts.filter(lambda row: row["word"] in words).take(10**9, **how)
    windows = sorted({row["window"] for row in rows})
    found = {(row["window"], row["word"]): row["count"] for row in rows}
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    lines = [[found.get((window, word), 0) for window in windows] for word in words]
    gap, free = max(map(max, lines)) / 22, 0.0  # labels stand apart, the lowest first
    for rank in sorted(range(len(words)), key=lambda rank: lines[rank][-1]):
        color, width = ("#c06020", 2.4) if rank == 0 else ("#7d9ab5", 1.2)
        axes.plot([window / 3600 for window in windows], lines[rank], color=color, linewidth=width)
        height = max(free, lines[rank][-1])
        axes.text(windows[-1] / 3600 + 0.3, height, words[rank], va="center", fontsize=9, color=color)
        free = height + gap
    axes.set(xlabel="hour", ylabel="times an hour", ylim=(0, None))
    axes.set_title(f"“{words[0]}” has risen most in the last hour; and the next four", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(counts: mh.Dataset, picture: str, **how: Any) -> None:
    """The rising words of the last window but for those that are still filling up; and a picture."""
    window = max(row["window"] for row in counts.take(10**9, **how))
    found = rising(counts, window, **how)
    for row in found:
        print(f"{row['word']:>12}  {row['count']:>6} now, {row['before']:8.2f} before, score {row['score']:6.2f}")
    try:
        draw(counts, [row["word"] for row in found[:5]], picture, **how)
    except ImportError:
        print("no picture: pip install matplotlib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["batch", "follow", "report", "sample"])
    parser.add_argument("inbox")
    parser.add_argument("out", nargs="?", default="runs/trends")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="of follow: how often to look")
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
