"""A small corpus with planted duplicates, for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path


def sentence(generator: random.Random, words: list[str], count: int) -> str:
    return " ".join(generator.choice(words) for _ in range(count))


def vocabulary(generator: random.Random, size: int = 2000) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyzäéж漢"
    return ["".join(generator.choice(letters) for _ in range(generator.randint(2, 9))) for _ in range(size)]


def changed(text: str, share: float, generator: random.Random, words: list[str]) -> str:
    """The text with this share of its words replaced."""
    parts = text.split(" ")
    for index in generator.sample(range(len(parts)), round(share * len(parts))):
        parts[index] = generator.choice(words)
    return " ".join(parts)


def write_corpus(folder: Path, count: int = 144) -> None:
    """Write documents-*.jsonl and corpus.toml.

    Every 8th document has an exact duplicate, every 6th a near-duplicate. Five documents break a cleaning rule or
    contain characters that cleaning replaces.
    """
    generator = random.Random(0)
    words = vocabulary(generator)
    texts = [sentence(generator, words, generator.randint(60, 200)) for _ in range(count)]
    texts += texts[::8] + [changed(text, 0.01, generator, words) for text in texts[::6]]
    texts += [
        "too short",
        "!?" * 100,
        "\ufffd" * 100 + "x" * 100,
        "the same line\n" * 50,
        "e\u0301\r\n" * 40 + "y" * 200,
    ]
    generator.shuffle(texts)
    for number in range(3):
        lines = [json.dumps({"text": text, "number": i}) + "\n" for i, text in enumerate(texts[number::3])]
        (folder / f"documents-{number}.jsonl").write_text("".join(lines))
    (folder / "corpus.toml").write_text("""
        seed = 3
        [input]
        paths = ["documents-*.jsonl"]
        partition_bytes = 30_000
        [tokenizer]
        vocabulary = 400
    """)
