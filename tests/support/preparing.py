"""A job with several shuffles, run by tests in this process and as a script that is killed: INPUT OUTPUT HOW.

HOW: the number of workers, the name of an engine, or all options as JSON.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import manyhands as mh

SIZE = 2**16  # so that little data makes many tasks


def write_posts(folder: Path, count: int = 2500) -> None:
    """Posts in three files of JSON lines: some users and words are frequent, most are rare."""
    generator = random.Random(0)
    files = [(folder / f"posts-{number}.jsonl").open("w") for number in range(3)]
    for number in range(count):
        words = [f"w{int(generator.paretovariate(0.5)) % 5000}" for _ in range(20)]
        post = {"id": number, "user": f"u{int(generator.paretovariate(0.7)) % 300}", "text": " ".join(words)}
        files[number % 3].write(json.dumps(post) + "\n")
    for file in files:
        file.close()


def words_of(post: dict[str, Any]) -> set[str]:
    """Its distinct words: a set, whose order depends on the seed of hashes."""
    return set(post["text"].split())


def several_shuffles(folder: Path | str) -> mh.Dataset:
    """Posts and words joined, arranged, deduplicated and shuffled."""
    posts = mh.Dataset.read(f"{folder}/posts-*.jsonl", partition_bytes=SIZE)
    words = posts.flat_map(lambda post: [{"user": post["user"], "word": word} for word in words_of(post)])
    counts = words.group_by("word").aggregate(count=mh.Aggregate.count(), users=mh.Aggregate.collect(of="user"))
    rare = counts.filter(lambda row: row["count"] < 500).map(lambda row: {**row, "users": len(set(row["users"]))})
    pairs = words.join(rare, on="word").map(lambda pair: {**pair[0], "count": pair[1]["count"]})
    scored = pairs.group_by(["user", "count"]).aggregate(mean=mh.Aggregate.mean(of=lambda row: row["count"] / 7))
    return scored.distinct(key=lambda row: (row["mean"], row["user"])).shuffle(seed=5).sort_by("count", descending=True)


def how(text: str) -> dict[str, Any]:
    """The options that the script's last argument specifies."""
    if text.startswith("{"):
        return dict(json.loads(text))
    return {"workers": int(text)} if text.isdigit() else {"engine": text, "workers": 2}


if __name__ == "__main__":
    made = several_shuffles(sys.argv[1])
    sys.stdout.write(made.write(sys.argv[2], progress=False, **how(sys.argv[3])).digest)
