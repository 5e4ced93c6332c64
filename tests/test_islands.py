"""The options of islands, and how they divide a run into rounds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import manyhands as mh
from manyhands.islands import Round
from support.island_runs import recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "islands.count is out of range"),
        ({"every": 0}, "islands.every is not valid"),
        ({"every": {5: 10}}, "islands.every is not valid"),
        ({"every": {0: 0}}, "islands.every is not valid"),
        ({"bits": 3}, "islands.bits has an unknown value"),
        ({"outer": "sgd"}, "islands.outer is not an outer optimizer"),
        ({"outer": {"lr": 0.1, "beta": 0.2}}, "islands.outer is not an outer optimizer"),
        ({"outer": {"momentum": 2.0}}, "nesterov.momentum is out of range"),
        ({"inner_state": "average"}, "islands.inner_state has an unknown value"),
        ({"error_feedback": "yes"}, "islands.error_feedback has the wrong type"),
        ({"error_feedback": True, "bits": 32}, "islands.error_feedback has no effect"),
        ({"compress": 1}, "islands.compress has the wrong type"),
        ({"delay": 10, "every": 10}, "islands.delay is as long as a round"),
        ({"outer": "averaging", "momentum_from": 3}, "islands.momentum_from has no effect"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mh.ConfigError, match=message):
        mh.Islands(**{"count": 2} | options)


def test_momentum_never_starts_at_random_weights_unless_asked_for() -> None:
    with pytest.raises(mh.ConfigError, match="outer momentum would start at random weights"):
        recipe(mh.Islands(count=2, outer=mh.Nesterov()))
    assert recipe(mh.Islands(count=2, outer="nesterov", momentum_from=0)).islands is not None
    assert recipe(mh.Islands(count=2, outer="nesterov"), weights="pretrained").islands is not None
    for pretrained, outers in ((False, {"Averaging"}), (True, {"Averaging", "Nesterov"})):
        rounds = mh.Islands(count=2).rounds(100, pretrained=pretrained)
        assert {type(each.outer).__name__ for each in rounds} == outers


def test_the_length_of_rounds() -> None:
    def ends(steps: int, *, pretrained: bool = False, **options: Any) -> list[int]:
        return [each.end for each in mh.Islands(count=2, **options).rounds(steps, pretrained=pretrained)]

    assert ends(25) == [10, 20, 25]
    assert ends(65, pretrained=True) == [30, 60, 65]
    assert ends(75, momentum_from=15) == [10, 20, 50, 75]
    assert ends(12, every={0: 2, 5: 3}) == [2, 4, 6, 9, 12]
    assert ends(12, every=5, warm_steps=4) == [9, 12]
    assert ends(3, every=5, warm_steps=4) == []


def test_the_last_round_is_averaged_and_has_no_delay() -> None:
    first, second, last = mh.Islands(count=2, every=4, outer="nesterov", momentum_from=0, delay=3).rounds(
        10, pretrained=False
    )
    assert first == Round(1, 0, 4, 7, mh.Nesterov(lr=0.7, momentum=0.9), False)
    assert second == Round(2, 4, 8, 9, mh.Nesterov(), False)  # applied before the end of a short last round
    assert last == Round(3, 8, 10, 10, mh.Averaging(), True)


@given(
    st.integers(1, 200),
    st.dictionaries(st.integers(1, 100), st.integers(1, 40), max_size=3),
    st.integers(1, 40),
    st.integers(0, 39),
    st.integers(0, 50),
    st.one_of(st.none(), st.integers(0, 100)),
)
def test_rounds_follow_each_other(
    steps: int, changes: dict[int, int], first: int, delay: int, warm: int, momentum: int | None
) -> None:
    lengths = {0: first, **changes}
    options = {"every": lengths, "delay": min(delay, *(each - 1 for each in lengths.values())), "warm_steps": warm}
    rounds = mh.Islands(count=3, momentum_from=momentum, **options).rounds(steps, pretrained=False)
    assert [each.number for each in rounds] == list(range(1, len(rounds) + 1))
    assert [each.start for each in rounds] == [warm, *(each.end for each in rounds[:-1])][: len(rounds)]
    assert not rounds or rounds[-1].end == rounds[-1].applied == steps
    assert [each.is_last for each in rounds] == [False] * (len(rounds) - 1) + [True] * bool(rounds)
    # States are found by their steps, so no two rounds may end, or be applied, after the same step.
    assert len({each.applied for each in rounds}) == len(rounds)
    assert all(each.end <= each.applied for each in rounds)
    assert all(each.applied < after.end for each, after in pairwise(rounds))


def test_what_islands_do_not_support() -> None:
    islands = mh.Islands(count=2)
    validation = mh.Validation(data=[1, 2], patience=2, every="5 steps")
    for changes in (
        {"ema": 0.9},
        {"data": mh.Stream(lambda part, parts: iter(range(9)), parts=1)},
        {"validation": validation},
    ):
        with pytest.raises(mh.ConfigError, match="islands don't support"):
            recipe(islands, **changes)
    with pytest.raises(mh.ConfigError, match=r"recipe\.islands has the wrong type"):
        recipe(3)  # type: ignore[arg-type]


def test_arguments_of_train(tmp_path: Path) -> None:
    islands = mh.Islands(count=2, every=5)
    for given_recipe, options, message in [
        (recipe(None), {"islands_at": str(tmp_path)}, "islands_at has no effect"),
        (recipe(islands), {"islands": [2]}, "islands is not a list of islands"),
        (recipe(islands), {"islands": "all"}, "islands is not a list of islands"),
        (recipe(islands), {"islands": [0]}, "the other islands can't be reached"),
        (recipe(mh.Islands(count=2, warm_steps=2)), {}, "warm steps need a run directory"),
    ]:
        with pytest.raises(mh.ConfigError, match=message):
            mh.train(given_recipe, steps=5, show=False, **options)


def test_islands_in_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "far.toml").write_text(
        """\
name = "far"
steps = 20
[model]
path = "torch.nn:Linear"
arguments = { in_features = 1, out_features = 1 }
[loss]
path = "support.island_runs:loss"
[data]
path = "builtins:list"
arguments = { }
[optimizer]
path = "torch.optim:SGD"
[batch]
global_size = 4
micro_size = 2
[islands]
count = 4
every = { 0 = 10, 300 = 30 }
outer = { lr = 0.5, momentum = 0.8 }
momentum_from = 300
""",
        encoding="utf-8",
    )
    found = mh.load_recipe(tmp_path / "far.toml", ["islands.bits=8"]).recipe.islands
    expected = mh.Islands(
        count=4, every={0: 10, 300: 30}, outer=mh.Nesterov(lr=0.5, momentum=0.8), momentum_from=300, bits=8
    )
    assert found == expected
