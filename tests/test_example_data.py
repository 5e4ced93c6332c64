"""The data examples beyond text: risk by Monte Carlo, and trends over files that keep arriving."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import manyhands as mh

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NORMAL = NormalDist()


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the module of an example under its own name, so that workers can import it, too."""
    monkeypatch.syspath_prepend(str(EXAMPLES / name))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / name / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def risk(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("risk", monkeypatch)


@pytest.fixture
def trends(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("trends", monkeypatch)


# Risk


def test_prices_are_those_of_black_and_scholes(risk: ModuleType) -> None:
    book = sys.modules["book"]
    points = np.array([-40.0, -8.0, -3.0, -0.5, 0.0, 0.3, 2.0, 6.9, 7.2, 40.0])
    exact = [math.erfc(-point / math.sqrt(2)) / 2 for point in points.tolist()]
    assert book.normal_cdf(points) == pytest.approx(exact, rel=1e-12, abs=1e-15)
    call, put = (book.Position(0, 1, strike=40.0, years=0.5, is_call=is_call) for is_call in (True, False))
    values = [book.option_price(np.array([42.0]), option, 0.2, 0.1, 0.5)[0] for option in (call, put)]
    assert values == pytest.approx([4.76, 0.81], abs=0.005)  # the example of Hull's textbook


def test_risk_matches_the_closed_form(risk: ModuleType, tmp_path: Path) -> None:
    book, level, paths = sys.modules["book"], 0.975, 2**17
    stock, years = book.Stock(100.0, 0.06, 0.3), 10 / 252
    spread, growth = 0.3 * math.sqrt(years), (0.06 - 0.3**2 / 2) * years
    low = NORMAL.inv_cdf(1 - level)
    price = 100.0 * math.exp(growth + spread * low)  # losses beyond the quantile are prices below this one
    below = 100.0 * math.exp(0.06 * years) * NORMAL.cdf(low - spread) / (1 - level)  # the mean of these prices
    held = book.Book((stock,), ((1.0,),), (book.Position(0, 1.0),))
    option = book.Position(0, 1.0, strike=100.0, years=0.5)
    for name, made, value, shortfall in [
        ("stock", held, price, 100.0 - below),
        ("call", book.Book((stock,), ((1.0,),), (option,)), None, None),
    ]:
        summary = risk.simulate(made, str(tmp_path / name), paths=paths, workers=0, memory="1GiB", progress=False)
        found = risk.risk_of(summary, level)
        if (
            value is None
        ):  # the value of the book rises with the price, so the quantile of the price gives that of the value
            value = made.value([np.array([price])], years)[0]
        assert found.paths == paths
        assert abs(found.var - (made.value_today() - value)) < 4 * found.var_error
        assert 0 < found.var_error < 0.03 * found.var
        if shortfall is not None:
            again = risk.simulate(made, str(tmp_path / "again"), paths=paths, workers=2, progress=False)
            assert again.digest == summary.digest
            assert abs(found.shortfall - shortfall) < 4 * found.shortfall_error


@pytest.mark.slow
def test_risk_has_the_same_digits_with_any_workers(risk: ModuleType, tmp_path: Path) -> None:
    book = sys.modules["book"].EXAMPLE
    found = [
        risk.simulate(book, str(tmp_path / str(workers)), paths=2**18, workers=workers, progress=False)
        for workers in (1, 3)
    ]
    assert found[0].digest == found[1].digest
    assert risk.risk_of(found[0], 0.99) == risk.risk_of(found[1], 0.99)


# Trends

HOW = {"workers": 0, "progress": False}


def rows(made: mh.Dataset) -> list[dict[str, object]]:
    return made.take(10**9, workers=0, progress=False)


def test_rising_words_are_found_while_posts_arrive(trends: ModuleType, tmp_path: Path) -> None:
    how = {"workers": 0, "progress": False}
    inbox, waiting, out = (str(tmp_path / name) for name in ("inbox", "waiting", "out"))
    trends.sample(waiting, files=6, posts=150)
    Path(inbox).mkdir()
    for number, path in enumerate(sorted(Path(waiting).iterdir())):
        path.rename(Path(inbox) / path.name)
        if number % 2:
            trends.follow(inbox, out, rounds=1, pause_seconds=0, **how)
    assert len(list((tmp_path / "out" / "batches").iterdir())) == 3
    at_once = trends.windowed_words(mh.Dataset.read(inbox))
    assert rows(trends.totals_of(out)) == rows(at_once)
    assert trends.rising(at_once, 5 * trends.WINDOW_SECONDS, **how)[0]["word"] == "aurora"


@pytest.mark.slow
def test_arriving_files_are_counted_once_however_often_it_is_killed(trends: ModuleType, tmp_path: Path) -> None:
    chance = random.Random(0)
    inbox, waiting, out = (str(tmp_path / name) for name in ("inbox", "waiting", "out"))
    trends.sample(waiting, files=24, posts=150)
    Path(inbox).mkdir()
    command = [sys.executable, str(EXAMPLES / "trends" / "trends.py"), "follow", inbox, out, "--workers", "2"]
    arriving = sorted(Path(waiting).iterdir())
    kills = 0
    while arriving:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(chance.randint(1, 3)):
            if arriving:
                path = arriving.pop(0)
                path.rename(Path(inbox) / path.name)
            time.sleep(chance.uniform(0.2, 1.5))
        process.kill()
        process.wait()
        kills += 1
    subprocess.run([*command, "--rounds", "1"], check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert kills >= 8
    assert rows(trends.totals_of(out)) == rows(trends.windowed_words(mh.Dataset.read(inbox)))
    assert sum(len(os.listdir(Path(out) / "totals" / name)) > 0 for name in os.listdir(Path(out) / "totals")) <= 2


def add_posts(inbox: Path, name: str, *words: str) -> Path:
    """Add a file to the inbox with a post for each word, all in the first window."""
    inbox.mkdir(exist_ok=True)
    path = inbox / name
    path.write_text("".join(f'{{"time": 60, "text": "{word}"}}\n' for word in words))
    return path


def words_in(made: mh.Dataset) -> dict[object, object]:
    return {row["word"]: row["count"] for row in rows(made)}


def test_totals_of_batch_100000_are_not_taken_for_older_than_those_of_batch_99999(
    trends: ModuleType, tmp_path: Path
) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    mh.Dataset.from_records([]).write(str(out / "totals" / "99997"), **HOW)
    for number, names in [(99998, ["99998"]), (99999, ["99998", "99999"]), (100000, ["99999", "100000"])]:
        add_posts(inbox, f"{number}.jsonl", "one", "two")
        trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
        assert words_in(trends.totals_of(str(out))) == {"one": number - 99997, "two": number - 99997}
        assert {path.name for path in (out / "totals").iterdir()} - {"99997"} == set(names)
    counted = [json.loads(path.read_text())[0]["name"] for path in sorted((out / "batches").iterdir())]
    assert counted == ["100000.jsonl", "99998.jsonl", "99999.jsonl"]


def test_a_file_that_is_replaced_before_it_is_counted_ends_follow(trends: ModuleType, tmp_path: Path) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    path = add_posts(inbox, "a.jsonl", "one")
    before = path.read_bytes()
    (out / "batches").mkdir(parents=True)
    trends.write_batch(inbox, out / "batches" / "00000.json", {})  # then it is killed
    add_posts(inbox, "a.jsonl", "two")  # of the same size
    with pytest.raises(mh.DataError, match="a file has changed before it was counted") as raised:
        trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert raised.value.where == str(path)
    assert (raised.value.expected, raised.value.got) == (
        f"{len(before)} bytes, SHA-256 {hashlib.sha256(before).hexdigest()}",
        f"{len(before)} bytes, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}",
    )
    assert [path.name for path in out.iterdir()] == ["batches"]
    path.write_bytes(before)
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert words_in(trends.totals_of(str(out))) == {"one": 1}


@pytest.mark.parametrize("ends", ["at once", "killed, and the file restored"])
def test_a_file_that_is_replaced_while_it_is_counted_is_not_published(
    trends: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    path = add_posts(inbox, "a.jsonl", "one", "one")
    times, write = os.stat(path), mh.Dataset.write

    def replace_and_write(self: mh.Dataset, folder: str, **options: object) -> object:
        path.rename(tmp_path / "kept")
        add_posts(inbox, "a.jsonl", "two", "two")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        summary = write(self, folder, **options)
        if ends != "at once":
            (tmp_path / "kept").rename(path)
            raise KeyboardInterrupt
        return summary

    with monkeypatch.context() as patch:
        patch.setattr(mh.Dataset, "write", replace_and_write)
        with pytest.raises(mh.DataError if ends == "at once" else KeyboardInterrupt):
            trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert not (out / "totals").exists()
    if ends == "at once":
        assert not list((out / "counts").iterdir())
        (tmp_path / "kept").rename(path)
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert words_in(trends.totals_of(str(out))) == {"one": 2}


@pytest.mark.parametrize("change", ["appended", "same size", "removed, and its name used again"])
def test_a_file_that_changes_after_it_was_counted_ends_follow(trends: ModuleType, tmp_path: Path, change: str) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    path = add_posts(inbox, "a.jsonl", "one")
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    path.touch()  # other times alone are no change
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    if change.startswith("removed"):
        path.unlink()
        trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    add_posts(inbox, "a.jsonl", *(["two"] if change == "same size" else ["one", "two"]))
    add_posts(inbox, "b.jsonl", "three")
    with pytest.raises(mh.DataError, match="a file has changed after it was counted") as raised:
        trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert raised.value.where == str(path)
    assert words_in(trends.totals_of(str(out))) == {"one": 1}
    path.unlink()
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert words_in(trends.totals_of(str(out))) == {"one": 1, "three": 1}


def test_follow_takes_complete_files_only_and_an_empty_one_does_not_end_it(trends: ModuleType, tmp_path: Path) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    (inbox / "folder").mkdir(parents=True)
    for name in ("empty.jsonl", ".hidden.jsonl", "_manifest.jsonl", "z.jsonl.tmp", "folder/x.jsonl"):
        add_posts(inbox, name, *([] if name == "empty.jsonl" else ["no"]))
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert words_in(trends.totals_of(str(out))) == {}
    add_posts(inbox, "z.jsonl", "yes")
    add_posts(inbox, "a.jsonl", "yes")  # sorts before those that were taken
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert words_in(trends.totals_of(str(out))) == {"yes": 2}
    taken = [[entry["name"] for entry in json.loads(path.read_text())] for path in sorted((out / "batches").iterdir())]
    assert taken == [["empty.jsonl"], ["a.jsonl", "z.jsonl"]]


def test_a_restart_does_not_count_earlier_batches_again(
    trends: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    for number in range(3):
        add_posts(inbox, f"{number}.jsonl", "one")
        trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    numbers: list[int] = []
    monkeypatch.setattr(trends, "count_batch", lambda inbox, folder, number, **how: numbers.append(number))
    (inbox / "0.jsonl").unlink()  # counted files may be removed
    add_posts(inbox, "3.jsonl", "one")
    trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
    assert numbers == [3]


def test_totals_are_right_after_a_kill_at_any_step(
    trends: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before or after its n-th write, of a list or an output, for all n."""
    kinds = [(trends, "write_durable"), (mh.Dataset, "write")]
    add_posts(tmp_path / "inbox", "a.jsonl", "one", "aaa")
    trends.follow(str(tmp_path / "inbox"), str(tmp_path / "out"), rounds=1, pause_seconds=0, **HOW)
    add_posts(tmp_path / "inbox", "b.jsonl", "one", "bbb")
    for kill_at in itertools.count(1):
        inbox, out = tmp_path / "inbox", tmp_path / f"out-{kill_at}"
        shutil.copytree(tmp_path / "out", out)
        steps = itertools.count(1)

        def may_end(steps: Iterator[int] = steps, kill_at: int = kill_at) -> None:
            if next(steps) == kill_at:
                raise KeyboardInterrupt

        killed = False
        with monkeypatch.context() as patch:
            for owner, name in kinds:
                patch.setattr(owner, name, around(getattr(owner, name), may_end))
            try:
                trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
            except KeyboardInterrupt:
                killed = True
        if not killed:
            assert kill_at == 9  # a batch writes two lists and two outputs
            return
        trends.follow(str(inbox), str(out), rounds=1, pause_seconds=0, **HOW)
        assert words_in(trends.totals_of(str(out))) == {"one": 2, "aaa": 1, "bbb": 1}


def around(write: Callable[..., Any], before_and_after: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*given: Any, **options: Any) -> Any:
        before_and_after()
        result = write(*given, **options)
        before_and_after()
        return result

    return wrapped
