"""Data jobs of very many files, tasks and columns: 10,000 files compared with DuckDB, and up to 50,000 tasks.

    .venv/bin/python benchmarks/prepare_many.py --files 10000 --tasks 1000 5000 20000 50000 --columns 1000 --rounds 3

input files: each contender counts the records of small files, and groups them by a key. columns: one CSV file of this
many columns is counted with a type for each column, and as text. output files: DuckDB writes one Parquet or JSON file
per key (COPY ... PARTITION_BY), with as many threads as we have workers. We write one per partition: with syncing, so
that a file survives a power loss, and without (fsync does nothing in all processes), which is what DuckDB does. The
contenders take turns; the tables show medians. tasks: the seconds per task must not grow with their number. The CPU
time of this process is that of the driver. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

import manyhands as mh
from manyhands.prepare.engines.local import close_persistent_pools

UNSYNCED = "import os\nos.fsync = lambda descriptor: None\n"
"""Workers import this as their sitecustomize."""


def numbers(count: int) -> mh.Dataset:
    """The numbers up to `count`, one in each partition."""
    return mh.Dataset.from_records(range(count), partition_bytes=1)


def seconds_of(job: Callable[[Path], object], data: Path) -> float:
    """The seconds that a job needs to write into a new folder, which is removed afterwards."""
    out = data / "out"
    started = time.perf_counter()
    job(out)
    seconds = time.perf_counter() - started
    shutil.rmtree(out, ignore_errors=True)
    return seconds


def ours(count: int, form: str, workers: int, *, synced: bool, data: Path) -> float:
    """Write `count` files. Workers are started before, as they are in a program with several jobs."""
    fsync, path = os.fsync, os.environ.get("PYTHONPATH", "")
    if not synced:
        (data / "sitecustomize.py").write_text(UNSYNCED)
        os.environ["PYTHONPATH"] = f"{data}{os.pathsep}{path}"
        os.fsync = lambda descriptor: None
    try:
        numbers(workers).count(workers=workers, progress=False)
        records = numbers(count).map(lambda n: {"n": n, "key": n})
        return seconds_of(lambda out: records.write(str(out), format=form, workers=workers, progress=False), data)
    finally:
        os.fsync, os.environ["PYTHONPATH"] = fsync, path
        close_persistent_pools()


def theirs(count: int, form: str, workers: int, data: Path) -> float:
    """Write `count` files with DuckDB."""
    connection = duckdb.connect(config={"threads": workers})
    what = f"(SELECT n, n AS key FROM range({count}) rows(n)) TO '{data / 'out'}' (FORMAT {form}, PARTITION_BY (key))"
    return seconds_of(lambda out: connection.execute(f"COPY {what}"), data)


def compare_files(count: int, workers: int, rounds: int, data: Path) -> Table:
    """The medians of all contenders."""
    table = Table("format", "DuckDB", "unsynced", "ratio", "synced", "ratio", title=f"{count:,} output files, seconds")
    for form, name in (("parquet", "parquet"), ("jsonl", "json")):
        found: list[list[float]] = [[], [], []]
        for _ in range(rounds):
            found[0].append(theirs(count, name, workers, data))
            found[1].append(ours(count, form, workers, synced=False, data=data))
            found[2].append(ours(count, form, workers, synced=True, data=data))
        duck, unsynced, synced = map(statistics.median, found)
        numbers_ = [duck, unsynced, unsynced / duck, synced, synced / duck]
        table.add_row(form, *(f"{number:.1f}" for number in numbers_))
    return table


RECORDS_PER_FILE = 20


def write_inputs(count: int, data: Path) -> None:
    """Write `count` small files in each format."""
    for number in range(count):
        rows = [(number * RECORDS_PER_FILE + row, f"user{(number + row) % 97}") for row in range(RECORDS_PER_FILE)]
        lines = [f'{{"n":{n},"user":"{user}"}}\n' for n, user in rows]
        (data / "jsonl" / f"{number:05d}.jsonl").write_text("".join(lines))
        (data / "csv" / f"{number:05d}.csv").write_text("n,user\n" + "".join(f"{n},{user}\n" for n, user in rows))


def compare_inputs(count: int, workers: int, rounds: int, data: Path) -> Table:
    """The medians of reading `count` small files. Workers are started before."""
    for form in ("jsonl", "csv"):
        (data / form).mkdir()
    write_inputs(count, data)
    table = Table("format", "job", "DuckDB", "ours", "ratio", title=f"{count:,} input files, seconds")
    for form, reader in (("jsonl", "read_json_auto"), ("csv", "read_csv_auto")):
        for job in ("count", "group"):
            found: list[list[float]] = [[], []]
            for _ in range(rounds):
                found[0].append(_read_by_duckdb(f"{reader}('{data / form}/*.{form}')", job, workers))
                found[1].append(_read_by_us(str(data / form), job, workers))
            duck, mine = map(statistics.median, found)
            table.add_row(form, job, f"{duck:.1f}", f"{mine:.1f}", f"{mine / duck:.1f}")
    return table


def _read_by_duckdb(source: str, job: str, workers: int) -> float:
    columns, grouping = ("count(*)", "") if job == "count" else ("user, count(*)", "GROUP BY user ORDER BY user")
    connection = duckdb.connect(config={"threads": workers})
    started = time.perf_counter()
    connection.execute(f"SELECT {columns} FROM {source} {grouping}").fetchall()
    return time.perf_counter() - started


def _read_by_us(folder: str, job: str, workers: int) -> float:
    numbers(workers).count(workers=workers, progress=False)
    started = time.perf_counter()
    records = mh.Dataset.read(folder)
    if job == "count":
        records.count(workers=workers, progress=False)
    else:
        grouped = records.group_by("user").aggregate(count=mh.Aggregate.count())
        grouped.take(1000, workers=workers, progress=False)
    return time.perf_counter() - started


def measure_columns(count: int, rounds: int, data: Path) -> Table:
    """Seconds to count the rows of a CSV file with a type for each column, and as text."""
    names = [f"c{number}" for number in range(count)]
    path = data / "wide.csv"
    path.write_text("\n".join([",".join(names), *(",".join(map(str, range(row, row + count))) for row in range(2000))]))
    found: dict[str, list[float]] = {"text": [], "typed": []}
    for _ in range(rounds):
        for way, types in (("text", None), ("typed", dict.fromkeys(names, "int64"))):
            started = time.perf_counter()
            mh.Dataset.read(path, types=types).count(workers=0, progress=False)
            found[way].append(time.perf_counter() - started)
    text, typed = (statistics.median(found[way]) for way in ("text", "typed"))
    table = Table("columns", "text", "typed", "ratio", title="CSV, 2,000 rows, seconds")
    table.add_row(f"{count:,}", f"{text:.2f}", f"{typed:.2f}", f"{typed / text:.1f}")
    return table


def measure_tasks(counts: list[int], workers: int) -> Table:
    """Seconds of jobs that count this many records, one in each task."""
    table = Table("tasks", "seconds", "ms per task", "driver's CPU ms per task", title="tasks")
    for count in counts:
        started, cpu = time.perf_counter(), time.process_time()
        numbers(count).count(workers=workers, progress=False)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        table.add_row(f"{count:,}", f"{seconds:.1f}", f"{1e3 * seconds / count:.2f}", f"{1e3 * cpu / count:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, nargs="*", default=[1000, 5000, 20_000, 50_000])
    parser.add_argument("--columns", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write (default: the temporary folder)")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as data:
        if options.columns:
            console.print(measure_columns(options.columns, options.rounds, Path(data)))
        if options.files:
            console.print(compare_inputs(options.files, options.workers, options.rounds, Path(data)))
            console.print(compare_files(options.files, options.workers, options.rounds, Path(data)))
    if options.tasks:
        console.print(measure_tasks(options.tasks, options.workers))


if __name__ == "__main__":
    main()
