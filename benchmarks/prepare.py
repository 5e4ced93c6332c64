"""Data jobs compared with other tools: word count, sort, a cached second pass, tokens for training, a small job.

    make bench-prepare ARGS="--text-mb 382 --sort-mb 1000 --tokens-mb 32 --rounds 3"

words: counts the words of all installed Python sources. The texts are JSON lines, and white space divides the words.
sort: sorts rows of a random 64-bit key and 90 bytes, Parquet to Parquet. cached-documents: caches statistics of each
text, then adds up some of them in a second pass. cached-words: caches all words, then counts the long ones with a
Python function, which takes most of the time of that pass. tokens: encodes texts with a byte-level BPE tokenizer of
8,192 tokens, and writes them to token files in random order. small: sums 1,000 rows by key.

Each contender that supports a task runs in a process of its own, in turn; all must give the same result. The table
shows medians of the seconds to start, of the job (and their ratio to ours) and of the second pass, if there is one; and
the peak memory of all processes of a contender together. manyhands-700MB has a memory limit of 700 MB. Use a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from prepare_contenders import CONTENDERS, NOTHING

TASKS = ("words", "sort", "cached-documents", "cached-words", "tokens", "small")
VOCABULARY, END_OF_TEXT = 8192, "<|endoftext|>"
ROW_BYTES, FILE_BYTES = 98, 2**25
CONTENDER = Path(__file__).with_name("prepare_contenders.py")


def sources() -> Iterator[str]:
    """The text of all installed Python files, in an endless loop, without what contenders treat differently: white
    space that is not ASCII becomes a space, and the name of the special token is removed."""
    odd = {code: " " for code in range(sys.maxunicode) if chr(code).isspace() and chr(code) not in " \t\n\r\f"}
    paths = sorted(path for folder in site.getsitepackages() for path in Path(folder).rglob("*.py"))
    while True:
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace").translate(odd).replace(END_OF_TEXT, "")
            if text.strip():  # datatrove skips empty texts
                yield text


def write_text(folder: Path, size: int) -> None:
    """Write `size` bytes of JSON lines, one per source file, in files of about 32 MiB."""
    folder.mkdir()
    texts, written, number = sources(), 0, 0
    while written < size:
        with (folder / f"{number:05d}.jsonl").open("wb") as file:
            while file.tell() < min(FILE_BYTES, size - written):
                file.write(orjson.dumps({"text": next(texts)}) + b"\n")
            written, number = written + file.tell(), number + 1


def write_records(folder: Path, size: int) -> None:
    """Write `size` bytes of rows: key [0, 2**62), payload of 90 hexadecimal digits."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, start in enumerate(range(0, size, FILE_BYTES)):
        rows = min(FILE_BYTES, size - start) // ROW_BYTES
        payload = generator.bytes(45 * rows).hex()
        table = pa.table(
            {
                "key": generator.integers(0, 2**62, rows),
                "payload": [payload[90 * row : 90 * row + 90] for row in range(rows)],
            }
        )
        pq.write_table(table, folder / f"{number:05d}.parquet", compression="none", row_group_size=65_536)


def write_tokenizer(data: Path) -> None:
    """Write a tokenizer.json, trained on the first file of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    lines = sorted((data / "text").iterdir())[0].read_bytes().splitlines()
    tokenizer.train_from_iterator((orjson.loads(line)["text"] for line in lines), trainer)
    tokenizer.save(str(data / "tokenizer.json"))


def members(mark: str) -> list[Path]:
    """The folders in /proc of all processes with that mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes():
                found.append(path)
    return found


def memory_bytes(processes: list[Path]) -> int:
    """The memory of these processes together, without mapped files. Shared memory is counted once."""
    total = 0
    for path in processes:
        with suppress(OSError):
            for line in (path / "smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += 1024 * int(line.split()[1])
    return total


def run(contender: str, task: str, data: Path, workers: int, limit_seconds: float) -> dict[str, Any]:
    """Run one contender on one task, once. Removes its files, and kills its remaining processes."""
    with tempfile.TemporaryDirectory(dir=data.parent) as name:
        folder = Path(name)
        for part in ("text", "records", "texts", "tokenizer.json"):
            (folder / part).symlink_to(data / part)
        command = [sys.executable, "-W", "ignore", str(CONTENDER), contender, task, str(folder), str(workers)]
        mark, peak = f"BENCH_PREPARE={folder}", 0
        with (folder / "said").open("w+") as said, (folder / "errors").open("w+") as errors:
            environment = {**os.environ, "BENCH_PREPARE": str(folder)}
            process = subprocess.Popen(command, stdout=said, stderr=errors, env=environment)
            deadline = time.monotonic() + limit_seconds
            while process.poll() is None and time.monotonic() < deadline:
                peak = max(peak, memory_bytes(members(mark)))
                time.sleep(0.25)
            code = process.poll()
            for path in members(mark):  # some of Ray's processes outlive the program
                with suppress(ProcessLookupError):
                    os.kill(int(path.name), signal.SIGKILL)
            process.wait()
            if code is None:
                return {"skipped": f"took longer than {limit_seconds:g} s"}
            said.seek(0)
            errors.seek(0)
            lines, wrong = said.read().splitlines(), errors.read().strip().splitlines()
    if code:
        return {"skipped": f"failed: {wrong[-1][:100] if wrong else code}"}
    return {**json.loads(lines[-1]), "peak_bytes": peak}


def show(task: str, results: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """A table of one task."""
    table = Table(title=task, title_justify="left")
    for column in ("", "start s", "job s", "ratio to ours", "second pass s", "peak MiB", "result"):
        table.add_column(column, justify="left" if column in ("", "result") else "right")

    def median(contender: str, phase: str) -> float:
        found = [each["seconds"][phase] for each in results[contender] if phase in each.get("seconds", {})]
        return statistics.median(found) if found else float("nan")

    def text(value: float, form: str) -> str:
        return "" if value != value else format(value, form)

    for contender, found in results.items():
        if found[0].get("skipped") == NOTHING:
            continue
        job = median(contender, "job")
        table.add_row(
            contender,
            text(median(contender, "start"), ".2f"),
            text(job, ".2f"),
            text(job / median("manyhands", "job"), ".2f") if "manyhands" in results else "",
            text(median(contender, "again"), ".3f"),
            str(max(each.get("peak_bytes", 0) for each in found) >> 20),
            str(found[0].get("skipped") or found[0]["check"]),
        )
    console.print(table)
    checks = {each["check"] for found in results.values() for each in found if "check" in each}
    if len(checks) > 1:
        console.print(f"[red]the results differ[/]: {checks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-mb", type=int, default=382)
    parser.add_argument("--sort-mb", type=int, default=1000)
    parser.add_argument("--tokens-mb", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for one contender and task")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    root = Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    try:
        data = root / "data"
        data.mkdir()
        write_text(data / "text", options.text_mb * 10**6)
        write_text(data / "texts", options.tokens_mb * 10**6)
        write_records(data / "records", options.sort_mb * 10**6)
        write_tokenizer(data)
        for task in options.tasks:
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
            for _ in range(options.rounds):
                for contender, found in results.items():
                    found.append(run(contender, task, data, options.workers, options.limit_seconds))
            show(task, results, console)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
