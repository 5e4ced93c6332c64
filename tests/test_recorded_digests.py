"""No change of the code changes a bit: digests of weights and buffers, recorded in tests/digests.json."""

from __future__ import annotations

import importlib.util

import pytest

from support.recorded import CASES, WAYS, machine, of_islands, read_table, run_case

QUICK_WAYS = [("ddp", 1), ("zero3", 3)]
NEEDS_EXTRA = not all(map(importlib.util.find_spec, ("torchvision", "transformers", "peft")))


# peft reads a property of transformers by the name that it had before transformers 5.24.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(QUICK_WAYS, id="quick"),
        pytest.param([way for way in WAYS if way not in QUICK_WAYS], id="rest", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_a_case_has_its_recorded_digests(name: str, ways: list[tuple[str, int]]) -> None:
    if NEEDS_EXTRA and not name.startswith(("gpt,", "convolutions")):
        pytest.skip("the extra `models` isn't installed")
    found = dict(run_case(name, ways))
    first = next(iter(found.values()))
    assert {way: digests for way, digests in found.items() if digests != first} == {}
    recorded = read_table().get(machine(), {}).get(name)
    if recorded is None:
        pytest.skip(f"no digests are recorded for {machine()}: `make digests` at a commit that is known to be right")
    assert first == recorded


def test_islands_have_their_recorded_digests() -> None:
    recorded = {name: digests for name, digests in read_table().get(machine(), {}).items() if "islands" in name}
    if not recorded:
        pytest.skip(f"no digests are recorded for {machine()}")
    assert of_islands() == recorded
