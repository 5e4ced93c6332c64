"""Checkpoints in an object store, a real server with S3's interface, have the same guarantees as on a disk."""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import manyhands as mh
from manyhands.checkpoint.format import list_checkpoints, read_manifest
from manyhands.comm.group import Group
from manyhands.errors import CheckpointError, ConfigError
from manyhands.listeners.run_directory import RunDirectory
from manyhands.storage import location as addresses
from manyhands.storage.location import Address, StoreError, location_of
from manyhands.training.run_record import RunRecord
from support.models import PartlyUsed, gpt_recipe
from support.s3 import BUCKET, VARIABLES, Network, free_port, running
from support.threads import run_threads
from support.training import train_with_engine

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("s3fs", "moto"))), reason="s3fs and moto[server] aren't installed"
)
STEPS = 4


def small_recipe(**kinds: Any) -> mh.Recipe:
    """A recipe with four micro-batches per step."""
    return gpt_recipe(**({"model": PartlyUsed, "batch": mh.Batch(global_size=8, micro_size=2)} | kinds))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure s3fs for the server, as a user would."""
    import s3fs

    for name, value in (VARIABLES | {"AWS_ENDPOINT_URL": url}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def folder(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An address with no objects below it."""
    use(server, monkeypatch)
    return f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"


def objects(folder: str) -> list[str]:
    return Address(folder).files()


def steps_in(folder: str) -> list[int]:
    return [step for step, _ in list_checkpoints(Address(folder))]


def saved(folder: str, steps: int = 2, workers: int = 2, sharding: str = "zero2", **kinds: Any) -> str:
    """Train some steps, write a checkpoint to `folder` and return its digest."""

    def work(group: Group) -> str:
        with mh.Engine(small_recipe(**kinds), mh.Strategy(sharding=sharding), group=group) as engine:
            for batch in engine.batches(steps):
                engine.step(batch)
            assert str(engine.save(folder)) == f"{folder}/step-{steps:08d}"
            return engine.digest()

    return run_threads(workers, work)[0]


def loaded(checkpoint: str, workers: int, sharding: str) -> str:
    """Resume from the checkpoint and return the digest at the end."""

    def work(group: Group) -> str:
        with mh.Engine(small_recipe(), mh.Strategy(sharding=sharding), group=group) as engine:
            engine.load(checkpoint)
            for batch in engine.batches(STEPS):
                engine.step(batch)
            return engine.digest()

    (digest,) = set(run_threads(workers, work))
    return digest


def test_a_checkpoint_in_a_store_loads_with_any_number_of_workers(folder: str) -> None:
    saved(folder, workers=3)
    undisturbed = train_with_engine(small_recipe(), mh.Strategy(), steps=STEPS).digest
    for workers, sharding in ((1, "ddp"), (2, "zero3")):
        assert loaded(f"{folder}/step-00000002", workers, sharding) == undisturbed
    (attempt,) = {piece.file.partition("/")[0] for piece in read_manifest(Address(folder) / "step-00000002").pieces}
    files = ["manifest.json", *(f"{attempt}/worker-{rank}.safetensors" for rank in range(3))]
    assert objects(folder) == sorted(f"step-00000002/{name}" for name in files)


def test_a_run_writes_its_checkpoints_to_a_store_and_records_the_address(folder: str, tmp_path: Path) -> None:
    run_dir, began = tmp_path / "run", time.time()
    where: dict[str, Any] = {"run_dir": run_dir, "checkpoint_dir": folder, "show": False}
    mh.train(small_recipe(), steps=5, checkpoint_every=1, keep_checkpoints=1, keep_every=2, **where)
    assert steps_in(folder) == [2, 4, 5]
    assert len(objects(folder)) == 2 * 3 + 1  # run.json names the run
    assert list((run_dir / "checkpoints").iterdir()) == []
    events = [event for event in RunDirectory(run_dir).read_events() if event["event"] == "saved"]
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5]
    assert all(began < event["seconds"] < time.time() for event in events)

    with pytest.raises(ConfigError, match="the run's checkpoints are in a place that only its manifest names"):
        mh.train(small_recipe(), steps=6, run_dir=run_dir, show=False)
    longer = mh.train(small_recipe(), steps=6, **where)
    assert steps_in(folder) == [4, 5, 6]
    assert longer.digest == train_with_engine(small_recipe(), mh.Strategy(), steps=6).digest
    assert mh.export(folder, tmp_path / "out").digest == longer.digest
    assert mh.export(f"{folder}/step-00000004", tmp_path / "four").step == 4
    with pytest.raises(ConfigError, match="the run's checkpoints are in another location"):
        mh.train(small_recipe(), steps=7, run_dir=run_dir, checkpoint_dir=f"{folder}/other", show=False)


@pytest.mark.slow
def test_checkpoints_in_a_store_need_no_run_directory(folder: str) -> None:
    mh.train(small_recipe(), steps=2, checkpoint_dir=folder, show=False)
    longer = mh.train(small_recipe(), steps=STEPS, checkpoint_dir=folder, show=False)
    assert longer.digest == train_with_engine(small_recipe(), mh.Strategy(), steps=STEPS).digest
    assert steps_in(folder) == [2, 4]


def test_hosts_without_a_shared_directory_find_the_store(folder: str, tmp_path: Path) -> None:
    mh.train(small_recipe(), steps=2, run_dir=tmp_path / "0", checkpoint_dir=folder, show=False)

    def work(group: Group) -> int:
        with ExitStack() as stack:
            engine = stack.enter_context(mh.Engine(small_recipe(), group=group))
            named = folder if group.rank == 0 else None
            RunRecord(engine, tmp_path / str(group.rank), named, None, stack).resume(False)
            return engine.step_index

    assert run_threads(2, work) == [2, 2]
    assert not (tmp_path / "1").exists()


def test_a_folder_without_a_manifest_is_no_checkpoint_and_is_deleted_by_the_next_save(folder: str) -> None:
    saved(folder)
    whole = set(objects(folder))
    attempt = "0123456789abcdef"
    foreign = ["step-00000001/notes.txt", "step-00000009/0123/worker-0.safetensors", "readme.txt"]
    leftovers = [f"step-0000000{step}/{attempt}/worker-0.safetensors" for step in (1, 2)]
    leftovers += [f"step-00000001/{attempt}/part-0.json", f"frozen-{attempt}/{attempt}/worker-1.safetensors"]
    for name in [*foreign, *leftovers]:
        (Address(folder) / name).write_text("half")
    assert steps_in(folder) == [2]
    saved(folder, steps=3, workers=1)
    assert {name for name in objects(folder) if not name.startswith("step-00000003/")} == whole | set(foreign)


@pytest.mark.slow
def test_a_checkpoint_of_other_weights_at_the_same_step_is_replaced(folder: str) -> None:
    saved(folder, workers=2)
    with mh.Engine(small_recipe()) as engine:
        engine.load(f"{folder}/step-00000002")
        with torch.no_grad():
            engine.updater.refill(lambda piece: piece.master.add_(1.0))
        expected = engine.digest()
        engine.save(folder)
    with mh.Engine(small_recipe()) as engine:
        engine.load(f"{folder}/step-00000002")
        assert engine.digest() == expected
    assert len(objects(folder)) == 2  # the previous objects were deleted


def test_files_are_uploaded_in_parts_and_read_in_ranges(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one part at a time is in memory, and each worker reads only its own ranges."""
    monkeypatch.setattr(addresses, "AHEAD_BYTES", 1 << 18)
    monkeypatch.setattr("manyhands.storage.location.AHEAD_BYTES", 1 << 18)
    monkeypatch.setattr(addresses, "_PART_BYTES", 5 << 20)  # S3's least
    read_range, ranges = Address.read_range, []

    def noted(self: Address, start: int, end: int) -> bytes:
        ranges.append(end - start)
        return read_range(self, start, end)

    monkeypatch.setattr(Address, "read_range", noted)
    big = small_recipe(model=lambda: torch.nn.Embedding(101, 1 << 14))
    with mh.Engine(big) as engine:
        checkpoint = engine.save(folder)
        file = Address(folder) / objects(folder)[0]
        assert file._system.info(file._inner)["ETag"].endswith('-2"')  # so many parts
    assert ranges == []

    def work(group: Group) -> None:
        with mh.Engine(big, group=group) as engine:
            engine.load(checkpoint)

    run_threads(2, work)
    assert max(ranges) == 1 << 18
    # Each read the piece of 2^18 elements in which their shards meet, and some ahead of its own end.
    assert sum(ranges) < file.size() + 2 * ((1 << 20) + (1 << 18))


def test_a_missing_bucket_is_reported_before_training(folder: str, tmp_path: Path) -> None:
    with mh.Engine(small_recipe()) as engine, pytest.raises(CheckpointError, match="bucket does not exist") as caught:
        engine.save("s3://nowhere/run")
    assert caught.value.where is not None
    assert caught.value.where.startswith("s3://nowhere/run")
    assert caught.value.hint == "create the bucket first, or correct the address"
    with pytest.raises(CheckpointError, match="bucket does not exist"):
        mh.train(small_recipe(), steps=2, run_dir=tmp_path, checkpoint_dir="s3://nowhere/run", show=False)
    assert RunDirectory(tmp_path).read_metrics() == []
    with pytest.raises(CheckpointError, match="can't be listed"):
        mh.export("s3://nowhere/run", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no checkpoint here"):
        mh.export(folder, tmp_path / "out")


def test_a_missing_object_is_not_a_missing_bucket(folder: str) -> None:
    missing = Address(f"{folder}/missing")
    for read in (missing.read_bytes, missing.size, missing.open_to_read, lambda: missing.read_range(0, 10)):
        with pytest.raises(FileNotFoundError):
            read()
    with pytest.raises(StoreError, match="bucket does not exist"):
        Address("s3://nowhere/missing").read_range(0, 10)


def test_missing_credentials_are_reported(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CheckpointError, match="credentials") as caught:
        mh.train(small_recipe(), steps=2, checkpoint_dir=folder, show=False)
    assert caught.value.hint is not None
    assert "provide credentials" in caught.value.hint


@pytest.mark.parametrize("text", ["gs://bucket/run", "nothing://bucket/run", Path("s3://bucket/run")])
def test_an_invalid_address_is_reported(text: str | Path) -> None:
    if str(text).startswith("gs:") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(ConfigError, match="the address can't be used") as caught:
        mh.train(small_recipe(), steps=1, checkpoint_dir=text, show=False)
    assert caught.value.hint is not None


def test_a_local_address_is_a_folder(tmp_path: Path) -> None:
    assert location_of(f"file://{tmp_path}") == location_of(str(tmp_path)) == tmp_path


def test_a_network_failure_is_reported_and_the_next_checkpoint_is_tried(
    server: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, calls = small_recipe(), itertools.count()

    def loss(model: torch.nn.Module, batch: Any) -> Any:
        at = {recipe.batch.micro_batches * steps: change for steps, change in ((1, network.cut), (2, network.mended))}
        at.get(next(calls), lambda: None)()
        return recipe.loss(model, batch)

    with Network(server) as network:
        use(network.url, monkeypatch)
        faulty = small_recipe(loss=loss)
        summary = mh.train(faulty, steps=4, run_dir=tmp_path, checkpoint_dir=folder, checkpoint_every=1)
        assert steps_in(folder)[-2:] == [3, 4]
        assert 2 not in steps_in(folder)
    assert summary.digest == train_with_engine(recipe, mh.Strategy(), steps=4).digest
    output = capsys.readouterr().err
    assert "training continues, but the checkpoint can't be written" in output
    assert "check that the store can be reached" in output
    assert "not saved" in {event["event"] for event in RunDirectory(tmp_path).read_events()}


def test_an_unreachable_store_is_not_treated_as_empty(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run would restart from the beginning."""
    mh.train(small_recipe(), steps=1, run_dir=tmp_path, checkpoint_dir=folder, show=False)
    before = RunDirectory(tmp_path).metrics.read_bytes()
    use(f"http://127.0.0.1:{free_port()}", monkeypatch)
    with pytest.raises(CheckpointError, match="Could not connect") as caught:
        mh.train(small_recipe(), steps=2, run_dir=tmp_path, checkpoint_dir=folder, show=False)
    assert caught.value.hint is not None
    assert "can be reached" in caught.value.hint
    assert RunDirectory(tmp_path).metrics.read_bytes() == before
    assert json.loads((tmp_path / "manifest.json").read_text())["checkpoints"] == folder
