"""Finds words that become more frequent: counts words by time window, even while posts arrive.

    python examples/trends/trends.py batch  INBOX OUT    # counts all files in INBOX
    python examples/trends/trends.py follow INBOX OUT    # also counts files that arrive, until it is stopped
    python examples/trends/trends.py sample INBOX        # writes sample posts

A post is a line of JSON with `time` (seconds) and `text`. Move complete files into INBOX with a rename. Folders are
ignored, and names that start with `.` or `_` or end with `.tmp`. `follow` counts each file exactly once, however often
it is killed (even with kill -9):

    OUT/batches/00007.json   the files of batch 7 with their sizes and digests; written before they are counted, so that
                             the batch never changes
    OUT/counts/00007         the counts of batch 7; if the job is killed, it is repeated with the same bytes
    OUT/totals/00007         the totals of batches 0 to 7: totals of 6 + counts of 7

After a kill, `follow` resumes at the first batch without totals. Late posts count in the window of their own time.

A file is its name, its size and the digest of its bytes. If one is replaced before it is counted, or has other content
later while it is still in INBOX, `follow` ends with an error that names it, and publishes nothing from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import time
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class TakenFile:
    """A file of a batch, as it was when the batch was made. modified_ns: saves hashing a file that was not touched."""

    name: str
    size: int
    sha256: str
    modified_ns: int


def follow(inbox: str, out: str, *, rounds: int | None = None, pause_seconds: float = 1.0, **how: Any) -> None:
    """Count files as they arrive. rounds: stop after this many checks without new files (None: never stop).

    Raises DataError if a file has changed since it was taken.
    """
    folder = Path(out)
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    taken = {file.name: file for batch in (folder / "batches").glob("*.json") for file in read_batch(batch)}
    number = max(complete_totals(folder), default=-1) + 1
    while rounds is None or rounds > 0:
        batch = folder / "batches" / f"{number:05d}.json"
        if not batch.exists() and not write_batch(Path(inbox), batch, taken):
            rounds = None if rounds is None else rounds - 1
            time.sleep(pause_seconds)
            continue
        count_batch(inbox, folder, number, **how)
        number += 1


def files_in(inbox: Path) -> list[Path]:
    """The files to count: all that are directly in the folder, except those that are not complete or not data."""
    paths = (path for path in inbox.iterdir() if path.name[0] not in "._" and path.suffix != ".tmp")
    return sorted(path for path in paths if path.is_file())


def digest_of(path: Path) -> tuple[int, str]:
    """The size and the SHA-256 of the bytes of a file, read once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def read_batch(batch: Path) -> list[TakenFile]:
    """The files of a batch. Raises DataError if it names them only, as an earlier version of this example did."""
    entries = json.loads(batch.read_text())
    if not all(isinstance(entry, dict) for entry in entries):
        raise mh.DataError("a batch has no digests of its files", where=str(batch), hint="count into a new folder")
    return [TakenFile(**entry) for entry in entries]


def write_batch(inbox: Path, batch: Path, taken: dict[str, TakenFile]) -> bool:
    """Write the list of files of the next batch: all files not in an earlier batch. Return False if there are none.

    taken: the files of earlier batches; the new ones are added. Raises DataError if one of them has changed.
    """
    new: list[TakenFile] = []
    for path in files_in(inbox):
        known = taken.get(path.name)
        try:
            status = path.stat()
            if known is not None and (known.size, known.modified_ns) == (status.st_size, status.st_mtime_ns):
                continue
            found = TakenFile(path.name, *digest_of(path), status.st_mtime_ns)
        except FileNotFoundError:  # it was removed after it was listed
            continue
        if known is None:
            new.append(found)
        elif (known.size, known.sha256) != (found.size, found.sha256):
            hint = "restore it, or remove it from the folder; give new posts a file with a name of its own"
            raise changed("a file has changed after it was counted", path, known, found, hint)
        taken[path.name] = found
    if new:
        write_durable(batch, [asdict(file) for file in new])
    return bool(new)


def changed(what: str, path: Path, before: TakenFile, now: TakenFile | None, hint: str) -> mh.DataError:
    """The error for a file that isn't what it was when it was taken."""
    expected, got = (f"{file.size} bytes, SHA-256 {file.sha256}" if file else "no file" for file in (before, now))
    return mh.DataError(what, where=str(path), expected=expected, got=got, hint=hint)


def write_durable(path: Path, content: Any) -> None:
    """Write JSON to a file, all at once."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def count_batch(inbox: str, folder: Path, number: int, **how: Any) -> None:
    """Count a batch and add it to the totals, unless its totals exist. If this is killed, it can be repeated."""
    counts, totals = folder / "counts" / f"{number:05d}", folder / "totals" / f"{number:05d}"
    before = folder / "totals" / f"{number - 1:05d}"
    if not is_complete(totals):
        files = count_files(Path(inbox), folder / "batches" / f"{number:05d}.json", counts, **how)
        both = records_in(counts, *([before] if number else []))
        added = both.group_by(["window", "word"]).aggregate(count=mh.Aggregate.sum(of="count"))
        added.write(str(totals), overwrite=True, **how)
        (folder / "batches" / f"{number:05d}.stamps").unlink()
        print(f"batch {number}: {files} files", flush=True)
    for older in (folder / "totals").iterdir():
        # The last two stay, so that a process that reads the older one can finish.
        if older.name.isdecimal() and int(older.name) < number - 1:
            shutil.rmtree(older)


def count_files(inbox: Path, batch: Path, counts: Path, **how: Any) -> int:
    """Count the files of a batch, and return their number. The counted bytes are those whose digests are in the batch.

    The digests are checked first. Then the job must have read the same bytes, even if it was killed and resumed: so
    the stamps of the files must be the same before its first run and after its last.
    """
    files, stamps_before = read_batch(batch), batch.with_suffix(".stamps")
    while True:
        stamps = [checked(inbox / file.name, file, batch) for file in files]
        if not stamps_before.exists() or json.loads(stamps_before.read_text()) != stamps:
            shutil.rmtree(counts, ignore_errors=True)  # of a run that may have read other bytes
            write_durable(stamps_before, stamps)
        posts = mh.Dataset.read([str(inbox / file.name) for file in files])
        windowed_words(posts).write(str(counts), overwrite=True, **how)
        if [stamp(inbox / file.name) for file in files] == stamps:
            return len(files)
        shutil.rmtree(counts)


def stamp(path: Path) -> list[int]:
    """Numbers of which one differs whenever a file was replaced or written; an empty list if it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def checked(path: Path, file: TakenFile, batch: Path) -> list[int]:
    """The stamp of a file that has the size and the digest of a batch. Raises DataError if it has others."""
    before = stamp(path)
    found = TakenFile(file.name, *digest_of(path), file.modified_ns) if before else None
    if found != file:
        hint = f"restore the file; or remove {batch}, and its files are taken again as they are"
        raise changed("a file has changed before it was counted", path, file, found, hint)
    return before


def records_in(*folders: Path) -> mh.Dataset:
    """The records of all these outputs. An output without records has no files."""
    paths = [str(folder) for folder in folders if any(folder.glob("part-*"))]
    return mh.Dataset.read(paths) if paths else mh.Dataset.from_records([])


def is_complete(output: Path) -> bool:
    """True if the output is complete: its manifest exists, and the job folder has been removed."""
    return (output / "_manifest.json").exists() and not (output / ".manyhands").exists()


def complete_totals(folder: Path) -> dict[int, Path]:
    """The complete totals, by the number of their batch. Numbers, since "100000" is less than "99999" as text."""
    paths = (folder / "totals").iterdir() if (folder / "totals").exists() else ()
    return {int(path.name): path for path in paths if path.name.isdecimal() and is_complete(path)}


def totals_of(out: str) -> mh.Dataset:
    """Return the latest complete totals. Raises DataError if there are none yet."""
    totals = complete_totals(Path(out))
    if not totals:
        raise mh.DataError("there are no totals yet", where=out, hint="run `follow` first")
    return records_in(totals[max(totals)])


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
    try:
        run(options)
    except mh.ManyhandsError as error:
        parser.exit(1, f"{error}\n")


def run(options: argparse.Namespace) -> None:
    how = {"workers": options.workers}
    if options.command == "sample":
        sample(options.inbox)
    elif options.command == "follow":
        follow(options.inbox, options.out, rounds=options.rounds, pause_seconds=0.2, **how)
    elif options.command == "report":
        report(totals_of(options.out), os.path.join(options.out, "rising.png"), **how)
    else:
        counts = os.path.join(options.out, "all")
        posts = mh.Dataset.read([str(path) for path in files_in(Path(options.inbox))])
        windowed_words(posts).write(counts, overwrite=True, **how)
        report(records_in(Path(counts)), os.path.join(options.out, "rising.png"), **how)


if __name__ == "__main__":
    main()
