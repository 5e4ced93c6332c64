"""Tensor files are compatible with the safetensors library in both directions. Damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyhands.errors import InvariantError
from manyhands.storage.tensor_file import CODES, TensorEntry, TensorFile, TensorFileWriter, in_file_order

SHAPES = [(), (1,), (7,), (3, 5), (0,), (2, 0, 3)]


def tensors() -> dict[str, Tensor]:
    """Tensors of every type and many shapes."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for dtype, code in CODES.items():
        for shape in SHAPES:
            numel = int(torch.tensor(shape).prod()) if shape else 1
            raw = torch.randint(0, 2, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
            found[f"{code} {shape}"] = raw.view(dtype).view(shape)
    return found


def write(path: Path, named: dict[str, Tensor], step: int = 4) -> None:
    entries = in_file_order([TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()])
    with TensorFileWriter(path, entries, {"format": "pt"}) as file:
        for entry in entries:
            flat = named[entry.name].flatten()
            for start in range(0, flat.numel(), step):
                file.write(flat[start : start + step])


def same(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.flatten().view(torch.uint8).tolist() if tensor.numel() else [] for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]


def test_the_safetensors_library_reads_tensor_files(tmp_path: Path) -> None:
    write(tmp_path / "file", tensors())
    found = load_file(tmp_path / "file")
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert same(found[name], tensor), name


def test_files_of_the_safetensors_library_are_read_range_by_range(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "file", {"format": "pt"})
    file = TensorFile(tmp_path / "file")
    assert set(file.entries) == set(tensors())
    for name, tensor in tensors().items():
        assert file.entries[name] == (name, tensor.dtype, tuple(tensor.shape))
        flat = tensor.flatten()
        for start in range(flat.numel() + 1):
            for numel in range(flat.numel() - start + 1):
                assert same(file.read(name, start, numel), flat[start : start + numel]), (name, start, numel)


def test_every_tensor_is_aligned_to_its_element_size(tmp_path: Path) -> None:
    write(tmp_path / "file", tensors())
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors().items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name


@pytest.mark.parametrize(("name", "start", "numel"), [("other", 0, 1), ("x", 5, 1), ("x", 0, 6), ("x", -1, 2)])
def test_a_range_outside_a_tensor_is_refused(tmp_path: Path, name: str, start: int, numel: int) -> None:
    write(tmp_path / "file", {"x": torch.arange(5)})
    with pytest.raises(ValueError, match=name):
        TensorFile(tmp_path / "file").read(name, start, numel)


def broken(header: object, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (bytes(5), "truncated"),
        (broken({}, 2**40), "truncated"),
        (broken([]), "not a JSON object"),
        ((2).to_bytes(8, "little") + b"{]", "Expecting"),
        (broken({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}), "'x' has an unknown type"),
        (broken({"x": {"dtype": "F32", "shape": [1]}}), "'x' has an unknown type"),
        (broken({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}), "'x' does not fit the file"),
        (broken({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "'x' does not fit the file"),
        (broken({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}), "'x' does not fit the file"),
    ],
)
def test_a_damaged_file_header_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        TensorFile(tmp_path / "file")


def test_a_file_truncated_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "file", {"x": torch.arange(5)})
    file = TensorFile(tmp_path / "file")
    with (tmp_path / "file").open("r+b") as other:
        other.truncate((tmp_path / "file").stat().st_size - 8)
    with pytest.raises(ValueError, match="truncated"):
        file.read("x", 0, 5)


def test_writing_too_few_elements_raises_invariant_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InvariantError, match="incomplete"),
        TensorFileWriter(tmp_path / "file", [TensorEntry("x", torch.float32, (5,))]) as file,
    ):
        file.write(torch.zeros(4))
