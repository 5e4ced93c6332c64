"""Token files: written tokens are read back wherever files end, and samples of a large file are read at once."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import manyhands as mh
from manyhands.data.loader import MicroBatchLoader
from manyhands.data.permutation import Mixture
from manyhands.data.token_format import tail
from manyhands.prepare.io.token_writing import token_schema
from support.positions import sample_indices

TINY = 256  # bytes a partition: a few documents


def written(folder: Path, documents: list[list[int]], vocabulary: int = 100, **how: Any) -> mh.PrepareSummary:
    made = mh.Dataset.from_records([{"tokens": tokens} for tokens in documents], partition_bytes=TINY)
    schema = token_schema(vocabulary)
    return made.write(str(folder), format="tokens", schema=schema, workers=0, progress=False, overwrite=True, **how)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), max_size=40), min_size=1, max_size=30), st.integers(1, 50))
def test_items_are_the_tokens_in_order_wherever_documents_and_files_end(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], length: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    written(folder, documents)
    flat = [token for document in documents for token in document]
    numbers = [number for number, document in enumerate(documents) for _ in document]
    if len(flat) <= length:
        with pytest.raises(mh.DataError, match="too few tokens"):
            mh.TokenFile(folder, length)
        return
    data = mh.TokenFile(folder, length, boundaries=True)
    assert (data.tokens, data.documents, data.vocabulary) == (len(flat), len(documents), 100)
    assert len(data) == (len(flat) - 1) // length
    for index, item in enumerate(data[i] for i in range(len(data))):
        part = slice(index * length, (index + 1) * length + 1)
        assert item["tokens"].tolist() == flat[part]
        found = numbers[part]
        assert item["documents"].tolist() == [sorted(set(found)).index(number) for number in found]
    assert torch.equal(mh.TokenFile(folder, length)[0], data[0]["tokens"])
    data.verify()


def test_small_vocabularies_take_two_bytes_a_token_and_large_ones_four(tmp_path: Path) -> None:
    for vocabulary, size in ((2**16, 2), (2**16 + 1, 4), (0, 4)):
        summary = written(tmp_path / str(vocabulary), [[1, vocabulary - 1 if vocabulary else 2**32 - 1, 3]], vocabulary)
        assert mh.TokenFile(summary.path, 1)._files[0].tokens.dtype.itemsize == size
        assert mh.TokenFile(summary.path, 1)[1].tolist() == [vocabulary - 1 if vocabulary else 2**32 - 1, 3]


def test_values_that_are_not_tokens_are_refused(tmp_path: Path) -> None:
    for documents, says in (([[1, 100]], "outside the vocabulary of 100"), ([[1, -1]], "tokens"), ([None], "null")):
        with pytest.raises(mh.DataError, match=says):
            written(tmp_path / "out", documents)  # type: ignore[arg-type]
    with pytest.raises(mh.DataError, match="isn't in the schema"):
        mh.Dataset.from_records([{"text": "a"}]).write(str(tmp_path / "a"), format="tokens", workers=0)
    table = mh.Dataset.from_records([{"tokens": [1, 2]}]).map_batches(
        lambda _: pa.table({"tokens": pa.array([[1, 2], [3]], pa.list_(pa.uint8()))})
    )
    table.write(str(tmp_path / "b"), format="tokens", workers=0)
    assert mh.TokenFile(tmp_path / "b", 2)[0].tolist() == [1, 2, 3]


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(mh.DataError, match="no prepared tokens here"):
        mh.TokenFile(tmp_path, 2)
    with pytest.raises(mh.ConfigError, match="length"):
        mh.TokenFile(tmp_path, 0)
    with pytest.raises(mh.DataError, match="on a disk"):
        mh.TokenFile("s3://bucket/tokens", 2)
    summary = written(tmp_path / "tokens", [[1, 2, 3]] * 9)
    path = tmp_path / "tokens" / summary.files[0]
    assert mh.TokenFile(tmp_path, 2).tokens == 27  # the folder above, where tokenizer and card are
    whole = path.read_bytes()
    path.write_bytes(b"\7" + whole[1:])
    with pytest.raises(mh.DataError, match="has changed since it was prepared") as caught:
        mh.TokenFile(tmp_path, 2).verify()
    assert caught.value.where == str(path)
    path.write_bytes(whole[:-1] + b"!")
    with pytest.raises(mh.DataError, match="truncated, or is not a token file"):
        mh.TokenFile(tmp_path, 2)
    path.write_bytes(whole[8:])
    with pytest.raises(mh.DataError, match="size of a token file has changed"):
        mh.TokenFile(tmp_path, 2)
    path.unlink()
    with pytest.raises(mh.DataError, match="can't be read"):
        mh.TokenFile(tmp_path, 2)


def recipe(data: Any) -> mh.Recipe:
    return mh.Recipe(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: batch,
        optimizer=lambda params: torch.optim.SGD([p for _, p in params]),
        data=data,
        batch=mh.Batch(global_size=4, micro_size=4),
        seed=7,
    )


def test_any_step_of_a_large_file_is_read_without_the_rest(tmp_path: Path) -> None:
    tokens, documents, length = 10**9, 10**6, 512
    path = tmp_path / "part-00000.tokens"
    with path.open("wb") as file:  # the tokens are a hole: zeros that take no place
        file.truncate(2 * tokens)
        file.seek(2 * tokens)
        file.write((np.arange(1, documents + 1, dtype="<u8") * (tokens // documents)).tobytes())
        file.write(tail(tokens, documents, 50_000, 2))
    listed = [{"name": path.name, "bytes": path.stat().st_size, "records": documents, "sha256": ""}]
    (tmp_path / "_manifest.json").write_text(json.dumps({"files": listed}))
    for step in (0, 123_456, 3_000_000):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        data = mh.TokenFile(tmp_path, length, boundaries=True)
        with MicroBatchLoader(recipe(data)) as loader:
            batch = loader.load(step, 0)
        pages = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
        assert pages < 5000  # all of it: half a million, or a sixteenth where the kernel maps more at a time
        assert batch["tokens"].shape == (4, length + 1)
        first = int(sample_indices(7, len(data), [4 * step])[0]) * length
        ends = (first + np.arange(length + 1)) // (tokens // documents)
        assert batch["documents"][0].tolist() == (ends - ends[0]).tolist()


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_loader_processes_open_the_files_themselves(tmp_path: Path, loader_workers: int) -> None:
    written(tmp_path, [list(range(100))] * 5)
    data = mh.TokenFile(tmp_path, 10)
    packed = pickle.dumps(data)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[3], data[3])
    with MicroBatchLoader(recipe(data), loader_workers) as loader:
        batch = next(loader.stream([(2, 0)])).batch
    expected = sample_indices(7, len(data), range(8, 12)).tolist()
    assert torch.equal(batch, torch.stack([data[i] for i in expected]))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=4),
    st.integers(1, 200),
    st.integers(0, 5),
)
def test_a_mixture_has_the_shares_of_its_weights(parts: list[tuple[int, float]], samples: int, seed: int) -> None:
    datasets = [[(number, item) for item in range(size)] for number, (size, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    mixture = Mixture(datasets, weights, samples, seed)
    found = [mixture[index] for index in range(len(mixture))]
    assert len(found) == samples
    assert found == [Mixture(datasets, weights, samples, seed)[index] for index in range(samples)]
    for number, (size, weight) in enumerate(parts):
        mine = [item for part, item in found if part == number]
        assert abs(len(mine) - samples * weight / sum(weights)) < 1
        for start in range(0, len(mine), size):  # none twice before all have come once
            assert len(set(mine[start : start + size])) == len(mine[start : start + size])


def test_corpora_are_mixed_by_path_also_in_recipe_files(tmp_path: Path) -> None:
    written(tmp_path / "a", [[1] * 50])
    written(tmp_path / "b", [[2] * 500])
    mixed = mh.TokenFile.mixed({str(tmp_path / "a"): 1, str(tmp_path / "b"): 3}, length=7, samples=40)
    assert sum(int(mixed[i][0]) == 1 for i in range(40)) == 10
    assert mixed[0].shape == (8,)
    written(tmp_path / "c", [[3] * 500], vocabulary=200)
    with pytest.raises(mh.DataError, match="different tokens"):
        mh.TokenFile.mixed({str(tmp_path / "a"): 1, str(tmp_path / "c"): 3}, length=7)
    written(tmp_path / "d", [[3] * 500])
    for name in ("a", "d"):  # vocabularies of one size that were trained on different documents
        (tmp_path / name / "tokenizer.json").write_text(name)
    with pytest.raises(mh.DataError, match="different tokens"):
        mh.TokenFile.mixed({str(tmp_path / "a"): 1, str(tmp_path / "d"): 3}, length=7)
    (tmp_path / "a" / "tokenizer.json").unlink()
    for weights in ({}, {str(tmp_path / "a"): 0}):
        with pytest.raises(mh.ConfigError, match="mixture"):
            mh.TokenFile.mixed(weights, length=7)
    (tmp_path / "recipe.toml").write_text(f"""
        [model]
        path = "torch.nn:Linear"
        arguments = {{ in_features = 1, out_features = 1 }}
        [loss]
        path = "torch:sum"
        [data]
        path = "manyhands:TokenFile.mixed"
        arguments = {{ weights = {{ "{tmp_path}/a" = 1, "{tmp_path}/b" = 1 }}, length = 7 }}
        [optimizer]
        path = "torch.optim:SGD"
        [batch]
        global_size = 4
        micro_size = 4
    """)
    assert len(mh.load_recipe(tmp_path / "recipe.toml").recipe.data) == 7 + 71
    changed = ["data.path=manyhands:TokenFile", f"data.arguments={{path='{tmp_path}/b', length=7}}"]
    assert len(mh.load_recipe(tmp_path / "recipe.toml", changed).recipe.data) == 71
