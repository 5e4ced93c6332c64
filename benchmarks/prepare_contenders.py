"""What benchmarks/prepare.py measures: one contender doing one task, in a process of its own.

    python benchmarks/prepare_contenders.py CONTENDER TASK FOLDER WORKERS

FOLDER has text/*.jsonl, texts/*.jsonl (fewer), records/*.parquet and tokenizer.json. The last line of standard output
is JSON: seconds by phase, and a check of the result, which must be the same for all contenders. The phase `start` lasts
until the contender is ready; imports are not included.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

BLANK = r"\s+"  # between words; all white space in the text is ASCII
SMALL_ROWS = 1000
NOTHING = "does not support this task"
seconds: dict[str, float] = {}


@contextmanager
def phase(name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def small_rows() -> list[dict[str, int]]:
    return [{"key": row % 7, "value": row} for row in range(SMALL_ROWS)]


def words_of(record: dict[str, Any]) -> list[str]:
    words: list[str] = record["text"].split()
    return words


def figures_of(record: dict[str, Any]) -> dict[str, int]:
    """Statistics of a text: its words, its distinct words, and the letters of the longest word."""
    words = words_of(record)
    return {"words": len(words), "different": len(set(words)), "longest": max(map(len, words), default=0)}


def check_counts(total: int, distinct: int) -> str:
    return f"{total} words, {distinct} distinct"


def check_sorted(folder: Path) -> str:
    """The number of rows, and whether they are in order across all files, in the order of the files' names."""
    import pyarrow.parquet as pq

    keys = [pq.read_table(path, columns=["key"]).column("key").to_numpy() for path in sorted(folder.rglob("*.parquet"))]
    ends = [(part[0], part[-1]) for part in keys if len(part)]
    inside = all(bool((part[1:] >= part[:-1]).all()) for part in keys)
    across = all(left[1] <= right[0] for left, right in pairwise(ends))
    return f"{sum(map(len, keys))} rows, {'in order' if inside and across else 'NOT in order'}"


# Manyhands


def ours(task: str, folder: Path, workers: int, memory: str | None = None) -> str:
    import manyhands as mh

    how: dict[str, Any] = {"workers": workers, "progress": False, "memory": memory}
    out = str(folder / "out")
    if task == "small":
        for name in ("job", "again"):
            with phase(name):
                made = mh.Dataset.from_records(small_rows()).group_by("key").aggregate(sum=mh.Aggregate.sum(of="value"))
                made.write(f"{out}-{name}", **how)
        return str(sum(row["sum"] for row in made.take(10, workers=0, progress=False)))
    if task == "sort":
        with phase("job"):
            mh.Dataset.read(f"{folder}/records").sort_by("key").write(out, format="parquet", **how)
        return check_sorted(Path(out))
    if task == "tokens":
        return our_tokens(folder, workers, how)
    if task == "cached-documents":
        figures = mh.Dataset.read(f"{folder}/text").map(figures_of).cache()
        with phase("job"):
            count = figures.count(**how)
        with phase("again"):
            long = figures.filter(lambda row: row["longest"] > 30).group_by("longest")
            rows = long.aggregate(words=mh.Aggregate.sum(of="words")).take(10**6, **how)
        return f"{count} documents, {sum(row['words'] for row in rows)} words"
    words = mh.Dataset.read(f"{folder}/text").flat_map(words_of)
    if task == "cached-words":
        kept = words.cache()
        with phase("job"):
            total = kept.count(**how)
        with phase("again"):
            kept.filter(lambda word: len(word) > 8).count(**how)
        return f"{total} words"
    with phase("job"):
        counts = words.group_by().aggregate(count=mh.Aggregate.count())
        written = counts.write(out, format="parquet", **how)
    total = sum(row["count"] for row in mh.Dataset.read(out).take(10**9, workers=0, progress=False))
    return check_counts(total, written.records)


def our_tokens(folder: Path, workers: int, how: dict[str, Any], *, fast: bool = False) -> str:
    """What `manyhands prepare RECIPE.toml` does after cleaning: encode, shuffle, write."""
    import manyhands as mh
    from manyhands.corpus.tokenizing import encoder_of, faster
    from manyhands.prepare.io.token_writing import token_schema

    path = folder / "tokenizer.json"
    encoder = encoder_of(path.read_text(encoding="utf-8"), "<|endoftext|>", str(path))
    if fast:
        lines = sorted((folder / "texts").iterdir())[0].read_bytes().splitlines()[:200]
        encoder, why_not = faster(encoder, [orjson.loads(line)["text"] for line in lines])
        if why_not:
            raise NotImplementedError
    with phase("job"):
        texts = mh.Dataset.read(f"{folder}/texts", partition_bytes=2**24).map_batches(encoder).shuffle(0)
        texts.write(str(folder / "out"), format="tokens", schema=token_schema(encoder.vocabulary), **how)
    return f"{len(mh.TokenFile(folder / 'out', length=1)) + 1} tokens"


def ours_in_700_mb(task: str, folder: Path, workers: int) -> str:
    if task != "sort":
        raise NotImplementedError
    return ours(task, folder, workers, "700MB")


def ours_fast(task: str, folder: Path, workers: int) -> str:
    if task != "tokens":
        raise NotImplementedError
    return our_tokens(folder, workers, {"workers": workers, "progress": False}, fast=True)


# datatrove


def datatrove(task: str, folder: Path, workers: int) -> str:
    if task != "tokens":
        raise NotImplementedError
    import numpy as np
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # because its tasks already run in parallel
    parts, out = folder / "parts", folder / "out"
    encode = DocumentTokenizer(
        str(parts),
        str(folder / "tokenizer.json"),
        local_working_dir=str(folder / "work"),
        eos_token="<|endoftext|>",
        batch_size=1000,
        seed=0,
    )
    files = len(list((folder / "texts").iterdir()))
    merge = DocumentTokenizerMerger(str(parts), str(out), "all", seed=0, progress=False)
    with phase("job"):
        LocalPipelineExecutor(
            [JsonlReader(f"{folder}/texts"), encode], tasks=files, workers=workers, logging_dir=str(folder / "log-1")
        ).run()
        LocalPipelineExecutor([merge], logging_dir=str(folder / "log-2")).run()
    return f"{sum(np.memmap(path, np.uint16, 'r').size for path in out.glob('*.ds'))} tokens"


# A pool of processes from the standard library


def count_file(path: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    with open(path, "rb") as file:
        for line in file:
            counts.update(words_of(orjson.loads(line)))
    return counts


def cut_file(path: str, edges: list[int], out: str) -> list[str]:
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    which = np.searchsorted(edges, table.column("key").to_numpy(), side="right")
    names = []
    for part in range(len(edges) + 1):
        names.append(f"{out}/{Path(path).stem}-{part}.cut")
        pq.write_table(table.filter(which == part), names[-1], compression="none")
    return names


def sort_part(paths: list[str], out: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.concat_tables(map(pq.read_table, paths)).sort_by("key"), out, compression="zstd")


def processes(task: str, folder: Path, workers: int) -> str:
    out = folder / "out"
    out.mkdir()
    if task not in ("words", "sort"):
        raise NotImplementedError
    with phase("job"), ProcessPoolExecutor(workers) as pool:
        if task == "words":
            counts: Counter[str] = Counter()
            for some in pool.map(count_file, map(str, sorted((folder / "text").iterdir()))):
                counts.update(some)
            with (out / "counts.jsonl").open("wb") as file:
                file.writelines(orjson.dumps(pair) + b"\n" for pair in sorted(counts.items()))
            return check_counts(counts.total(), len(counts))
        files = list(map(str, sorted((folder / "records").iterdir())))
        parts = max(workers, len(files))
        edges = [2**62 // parts * part for part in range(1, parts)]
        cut = list(pool.map(cut_file, files, [edges] * len(files), [str(out)] * len(files)))
        names = [str(out / f"part-{part:05d}.parquet") for part in range(parts)]
        list(pool.map(sort_part, [[names[part] for names in cut] for part in range(parts)], names))
    return check_sorted(out)


# DuckDB


def duckdb(task: str, folder: Path, workers: int) -> str:
    import duckdb as db

    with phase("start"):
        connection = db.connect(config={"threads": workers})
    out = folder / "out.parquet"
    found, source = f"regexp_split_to_array(text, '{BLANK}')", f"from read_json('{folder}/text/*.jsonl')"
    words = f"select word from (select unnest({found}) as word {source}) where word != ''"
    if task == "tokens":
        raise NotImplementedError
    if task == "cached-documents":
        listed = f"list_filter({found}, lambda x: x != '')"
        columns = (
            "len(w) as words, list_unique(w) as different, list_max(list_transform(w, lambda x: len(x))) as longest"
        )
        with phase("job"):
            connection.execute(f"create table figures as select {columns} from (select {listed} as w {source})")
            count = connection.execute("select count(*) from figures").fetchall()[0][0]
        with phase("again"):
            long = "select longest, sum(words) as s from figures where longest > 30 group by longest"
            total = connection.execute(f"select sum(s)::bigint from ({long})").fetchall()[0][0]
        return f"{count} documents, {total} words"
    if task == "cached-words":
        with phase("job"):
            connection.execute(f"create table words as {words}")
            total = connection.execute("select count(*) from words").fetchall()[0][0]
        with phase("again"):
            connection.execute("select count(*) from words where length(word) > 8").fetchall()
        return f"{total} words"
    with phase("job"):
        if task == "small":
            rows = connection.execute(
                f"select sum(s) from (select range % 7 as key, sum(range) as s from range({SMALL_ROWS}) group by key)"
            ).fetchall()
            return str(rows[0][0])
        if task == "sort":
            (folder / "out").mkdir()
            ordered = f"from '{folder}/records/*.parquet' order by key"
            connection.execute(f"copy ({ordered}) to '{folder}/out/all.parquet' (compression zstd)")
        else:
            connection.execute(f"copy (select word, count(*) as count from ({words}) group by word) to '{out}'")
    if task == "sort":
        return check_sorted(folder / "out")
    return check_counts(*connection.execute(f"select sum(count)::bigint, count(*) from '{out}'").fetchall()[0])


# Dask


def dask(task: str, folder: Path, workers: int) -> str:
    import dask.bag as bag
    import distributed

    if task in ("sort", "tokens"):
        raise NotImplementedError
    with phase("start"):
        cluster = distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        client = distributed.Client(cluster)
    try:
        if task == "small":
            with phase("job"):
                made = bag.from_sequence(small_rows(), npartitions=workers)
                sums = made.foldby("key", lambda total, row: total + row["value"], 0, lambda a, b: a + b, 0).compute()
            return str(sum(total for _, total in sums))
        records = bag.read_text(f"{folder}/text/*.jsonl").map(orjson.loads)
        if task == "cached-documents":
            with phase("job"):
                figures = records.map(figures_of).persist()
                count = figures.count().compute()
            with phase("again"):
                long = figures.filter(lambda row: row["longest"] > 30)
                sums = dict(long.foldby("longest", lambda total, row: total + row["words"], 0, lambda a, b: a + b, 0))
            return f"{count} documents, {sum(sums.values())} words"
        words = records.map(words_of).flatten()
        if task == "cached-words":
            with phase("job"):
                kept = words.persist()
                total = kept.count().compute()
            with phase("again"):
                kept.filter(lambda word: len(word) > 8).count().compute()
            return f"{total} words"
        with phase("job"):
            counts = words.frequencies()
            counts.map(orjson.dumps).map(bytes.decode).to_textfiles(f"{folder}/out/*.jsonl")
        lines = [orjson.loads(line) for path in (folder / "out").iterdir() for line in path.read_bytes().splitlines()]
        return check_counts(sum(count for _, count in lines), len(lines))
    finally:
        client.close()
        cluster.close()


# Ray Data


def ray_data(task: str, folder: Path, workers: int) -> str:
    import ray

    if task in ("cached-words", "tokens"):
        raise NotImplementedError
    with phase("start"):
        ray.init("local", num_cpus=workers, logging_level="error", log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        with phase("job"):
            if task == "small":
                rows = ray.data.from_items(small_rows()).groupby("key").sum("value").take_all()
                return str(sum(row["sum(value)"] for row in rows))
            if task == "cached-documents":
                figures = ray.data.read_json(f"{folder}/text").map(figures_of).materialize()
                count = figures.count()
            elif task == "sort":
                ray.data.read_parquet(f"{folder}/records").sort("key").write_parquet(f"{folder}/out")
            else:
                words = ray.data.read_json(f"{folder}/text").flat_map(lambda row: [{"w": w} for w in words_of(row)])
                words.groupby("w").count().write_parquet(f"{folder}/out")
        if task == "sort":
            return check_sorted(folder / "out")
        if task == "cached-documents":
            with phase("again"):
                rows = figures.filter(lambda row: row["longest"] > 30).groupby("longest").sum("words").take_all()
            return f"{count} documents, {sum(row['sum(words)'] for row in rows)} words"
        rows = ray.data.read_parquet(f"{folder}/out").to_pandas()
        return check_counts(int(rows["count()"].sum()), len(rows))
    finally:
        ray.shutdown()


# Spark


def spark(task: str, folder: Path, workers: int) -> str:
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as f

    if task == "tokens":
        raise NotImplementedError
    with phase("start"):
        builder = SparkSession.builder.master(f"local[{workers}]").config("spark.ui.enabled", "false")
        session = builder.config("spark.driver.memory", "4g").config("spark.log.level", "ERROR").getOrCreate()
    out = str(folder / "out")
    found = f.split("text", BLANK)
    if task == "cached-documents":
        with phase("job"):
            lists = session.read.json(f"{folder}/text").select(f.array_remove(found, "").alias("w"))
            figures = lists.select(
                f.size("w").alias("words"),
                f.size(f.array_distinct("w")).alias("different"),
                f.array_max(f.transform("w", f.length)).alias("longest"),
            ).cache()
            count = figures.count()
        with phase("again"):
            rows = figures.filter("longest > 30").groupBy("longest").sum("words").collect()
        return f"{count} documents, {sum(row['sum(words)'] for row in rows)} words"
    words = session.read.json(f"{folder}/text").select(f.explode(found).alias("word")).filter("word != ''")
    if task == "cached-words":
        with phase("job"):
            kept = words.cache()
            total = kept.count()
        with phase("again"):
            kept.filter(f.length("word") > 8).count()
        return f"{total} words"
    with phase("job"):
        if task == "small":
            rows = session.createDataFrame([tuple(row.values()) for row in small_rows()], ["key", "value"])
            return str(sum(row["sum(value)"] for row in rows.groupBy("key").sum("value").collect()))
        if task == "sort":
            session.read.parquet(f"{folder}/records").orderBy("key").write.parquet(out)
        else:
            words.groupBy("word").count().write.parquet(out)
    if task == "sort":
        return check_sorted(Path(out))
    row = session.read.parquet(out).agg(f.sum("count"), f.count("*")).collect()[0]
    return check_counts(row[0], row[1])


CONTENDERS: dict[str, Callable[[str, Path, int], str]] = {
    "manyhands": ours,
    "manyhands-700MB": ours_in_700_mb,
    "manyhands-gigatoken": ours_fast,
    "processes": processes,
    "duckdb": duckdb,
    "dask": dask,
    "ray": ray_data,
    "spark": spark,
    "datatrove": datatrove,
}

if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        check = CONTENDERS[sys.argv[1]](sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        print(json.dumps({"seconds": seconds, "check": check}))
    except NotImplementedError:
        print(json.dumps({"skipped": NOTHING}))
    except ImportError as error:
        print(json.dumps({"skipped": f"not installed: {error.name}"}))
