"""A damaged checkpoint is refused with the file and the reason, or loads to the bits that were saved."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import manyhands as mh
from manyhands.errors import CheckpointError, NumericsError
from manyhands.storage.sealed import seal
from support.models import ConvNet, conv_recipe
from support.threads import run_threads

SAVED, FILES = 2, ("manifest.json", "worker-0.safetensors", "worker-1.safetensors")
ABSURD = [
    -1,
    0,
    1,
    7,
    1 << 31,
    1 << 63,
    10**40,
    1e308,
    0.5,
    math.nan,
    math.inf,
    True,
    None,
    "",
    "x",
    "../../x",
    "float32",
]
ABSURD += [[], {}, [1], [[]], {"x": 1}, "step-00000001", "worker-9.safetensors", "master"]


class FrozenStem(ConvNet):
    """A model whose first convolution is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1.weight.requires_grad_(False)


@cache
def recipe() -> mh.Recipe:
    """A recipe with buffers, a frozen parameter, moments, a schedule and two micro-batches per step."""
    batch = mh.Batch(global_size=4, micro_size=2)
    return conv_recipe(
        model=FrozenStem, batch=batch, optimizer=lambda params: torch.optim.AdamW([p for _, p in params], lr=1e-2)
    )


@dataclass
class Originals:
    """Two checkpoints of a run, of steps 1 and 2; digests after steps 2 and 3."""

    folder: Path
    digest: str
    next_digest: str


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    folder = tmp_path_factory.mktemp("originals")

    def work(group: Any) -> Originals:
        digests = []
        with mh.Engine(recipe(), mh.Strategy(sharding="zero2"), group=group) as engine:
            for batch in engine.batches(3):
                digests.append(engine.step(batch, digest=True).digest)
                if engine.step_index <= SAVED:
                    engine.save(folder)
        return Originals(folder, digests[1], digests[2])

    return run_threads(2, work)[0]


def flip(path: Path, chance: random.Random) -> None:
    """Flip a bit in the header's length, in the header, or anywhere."""
    data = bytearray(path.read_bytes())
    end = chance.choice([8, 8 + int.from_bytes(data[:8], "little"), len(data)]) if path.suffix != ".json" else len(data)
    data[chance.randrange(min(end, len(data)))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.choice([0, 1, 8, chance.randrange(path.stat().st_size)])])


def extend(path: Path, chance: random.Random) -> None:
    more = chance.choice([b"\0", b" ", b"{}", chance.randbytes(1000)])
    path.write_bytes(path.read_bytes() + more)


def overwrite(path: Path, chance: random.Random) -> None:
    """Overwrite a run of bytes, as if with a page of another file."""
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    data[start : start + 512] = chance.choice([bytes(512), chance.randbytes(512)])[: len(data) - start]
    path.write_bytes(data)


def lose(path: Path, chance: random.Random) -> None:
    """Delete the file, or replace it by a folder."""
    path.unlink()
    if chance.random() < 0.5:
        path.mkdir()


def foreign(path: Path, chance: random.Random) -> None:
    """Replace the file by that of the other worker, of the other step, or of another kind."""
    others = [other for name in FILES for other in path.parent.parent.glob(f"*/{name}") if other != path]
    shutil.copyfile(chance.choice(others), path)


def swap(path: Path, chance: random.Random) -> None:
    """Swap two files."""
    one, other = chance.sample(sorted(path.parent.parent.glob("*/*")), 2)
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def nest(path: Path, chance: random.Random) -> None:
    """Nest brackets very deeply."""
    deep = b"[" * 200_000
    path.write_bytes(deep if path.suffix == ".json" else len(deep).to_bytes(8, "little") + deep)


DAMAGES: list[Callable[[Path, random.Random], None]] = [flip, flip, cut, extend, overwrite, lose, foreign, swap, nest]


def absurd(path: Path, chance: random.Random) -> str:
    """Change or delete one value of the manifest, with a valid checksum. Return the value's position."""
    manifest = json.loads(path.read_text())
    place: Any = manifest
    trail = []
    while True:
        key = chance.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        trail.append(str(key))
        if not isinstance(place[key], (dict, list)) or not place[key] or chance.random() < 0.1:
            break
        place = place[key]
    if chance.random() < 0.2:
        del place[key]
    elif isinstance(place, list) and chance.random() < 0.3:
        place.append(place[key])
    else:
        place[key] = chance.choice([*ABSURD, chance.randrange(1000)])
    path.write_text(seal(manifest))
    return trail[0]


def is_refused(action: Callable[[], Any], folder: Path) -> bool:
    """True if it is refused, with an error that states what failed, where and what to do."""
    refused: CheckpointError | None = None
    try:
        action()
    except CheckpointError as error:
        refused = error
    assert refused is None or (str(refused.where).startswith(str(folder)) and refused.hint), refused
    return refused is not None


def export_is_refused(checkpoint: Path, out: Path) -> bool:
    """True if it is refused, and nothing was written."""
    before = sorted(out.parent.parent.iterdir())

    def export() -> None:
        try:
            mh.export(checkpoint, out)
        except mh.ConfigError as error:  # without a manifest there's none
            raise CheckpointError(error.what, where=error.where, hint=error.hint) from error

    refused = is_refused(export, checkpoint.parent)
    assert sorted(out.parent.parent.iterdir()) == before
    assert out.exists() is not refused
    return refused


def digests_of(checkpoint: Path) -> tuple[str, str]:
    """Return the digests at its step and after one more step, which depends on all of the state."""
    with mh.Engine(recipe()) as engine:
        engine.load(checkpoint)
        found = engine.digest()
        return found, str(engine.step(next(engine.batches()), digest=True).digest)


def damaged(originals: Originals, folder: Path) -> Path:
    shutil.copytree(originals.folder, folder)
    return folder / f"step-{SAVED:08d}"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 60))])
def test_damaged_files_are_refused_and_named_or_change_nothing(originals: Originals, tmp_path: Path, seed: int) -> None:
    chance, refused = random.Random(seed), 0
    for number in range(2 * len(DAMAGES)):
        folder = tmp_path / str(number)
        checkpoint = damaged(originals, folder)
        path = chance.choice(sorted(folder.glob("*/*")))
        damage = DAMAGES[number % len(DAMAGES)]
        damage(path, chance)
        case = f"seed {seed}, damage {number}: {damage.__name__} {path}"
        found: list[tuple[str, str]] = []
        was_refused = is_refused(lambda: found.append(digests_of(checkpoint)), folder)  # noqa: B023
        assert was_refused or found == [(originals.digest, originals.next_digest)], case
        export_is_refused(checkpoint, folder / "out")
        refused += was_refused
        shutil.rmtree(folder)
    assert refused


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 60))])
def test_absurd_manifests_are_refused_and_named(originals: Originals, tmp_path: Path, seed: int) -> None:
    """They are refused even if their checksums are valid, as after a bug in another program."""
    chance = random.Random(seed)
    for number in range(20):
        folder = tmp_path / str(number)
        checkpoint = damaged(originals, folder)
        what = absurd(checkpoint / "manifest.json", chance)
        case = f"seed {seed}, manifest {number}: {what}"
        engine = mh.Engine(recipe())
        try:
            assert is_refused(lambda: engine.load(checkpoint), folder) or engine.digest() == originals.digest, case  # noqa: B023
            export_is_refused(checkpoint, folder / "out")
        except NumericsError:
            assert what == "identity", case
        except Exception as error:
            raise AssertionError(case) from error
        finally:
            engine.close()
        shutil.rmtree(folder)


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(originals: Originals, tmp_path: Path) -> None:
    checkpoint = damaged(originals, tmp_path / "copy")
    renamed = checkpoint.rename(checkpoint.with_name("step-00000003"))
    with pytest.raises(CheckpointError, match="step differs from the one in its folder's name"):
        digests_of(renamed)
    assert digests_of(renamed.rename(renamed.with_name("best"))) == (originals.digest, originals.next_digest)
