"""The data examples beyond text: risk by Monte Carlo, and trends over files that keep arriving."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import NormalDist
from types import ModuleType

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
