"""Kernels get aligned memory, wherever parameters, buffers and samples come from: their bits depend on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import manyhands as mh
from manyhands.numerics.alignment import ALIGNMENT, is_aligned, with_aligned_storage
from support.training import train_with_engine

PICTURES = torch.randn(12, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def at(address: int, values: Tensor) -> Tensor:
    """Return a copy of `values` whose storage starts `address` bytes behind an aligned address."""
    memory = np.zeros(values.nbytes + 2 * ALIGNMENT, dtype=np.uint8)
    start = (address - memory.ctypes.data) % ALIGNMENT
    copied = torch.from_numpy(memory[start : start + values.nbytes].view(np.float32)).view(values.shape)
    copied.copy_(values)
    assert copied.data_ptr() % ALIGNMENT == address
    return copied


class Pictures(Dataset[Tensor]):
    def __init__(self, address: int) -> None:
        self.address = address

    def __len__(self) -> int:
        return len(PICTURES)

    def __getitem__(self, index: int) -> Tensor:
        return PICTURES[index]


class Net(nn.Module):
    """Its frozen convolution and its buffer start `address` bytes behind an aligned address."""

    shift: Tensor

    def __init__(self, address: int = 0) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False)
        self.frozen.weight.data = at(address, self.frozen.weight.data)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        self.register_buffer("shift", at(address, torch.randn(3, 9, 9)))
        self.seen: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        for name, tensor in (("x", x), *self.named_buffers(), *self.frozen.named_parameters()):
            assert is_aligned(tensor), name
        x = self.frozen(x + self.shift)
        for layer in self.layers:
            assert all(map(is_aligned, layer.parameters()))
            x = layer(x.tanh())
        return x


def recipe_of(address: int = 0, **changes: Any) -> mh.Recipe:
    return mh.Recipe(
        model=partial(Net, address),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=Pictures(address),
        collate=lambda samples: at(address, torch.stack(samples)),
        batch=mh.Batch(global_size=4, micro_size=2),
        **changes,
    )


def test_the_address_of_unaligned_tensors_changes_no_bit() -> None:
    expected = train_with_engine(recipe_of(), mh.Strategy(), steps=2).digest
    for address in (4, 20, 32):
        assert train_with_engine(recipe_of(address), mh.Strategy(), steps=2).digest == expected
    assert train_with_engine(recipe_of(20), mh.Strategy(loader_workers=1), steps=2).digest == expected


@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_parameters_are_aligned_in_every_layout(sharding: str, offload: str, tmp_path: Path) -> None:
    transport = "distributed" if offload != "cpu" else "auto"
    strategy = mh.Strategy(
        sharding=sharding, offload=offload, transport=transport, scratch=str(tmp_path), units=("layers.0", "layers.1")
    )
    train_with_engine(recipe_of(12), strategy, steps=1)


def test_weights_from_a_file_are_aligned(tmp_path: Path) -> None:
    """The names' lengths decide where a file's tensors start."""
    model = Net()
    state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "shift"}
    save_file({**state, "a": torch.zeros(1)}, tmp_path / "model.safetensors")
    weights = mh.Weights(path=tmp_path / "model.safetensors", ignore=["a"], allow_missing=["shift"])
    for sharding in ("ddp", "zero3"):
        strategy = mh.Strategy(sharding=sharding, transport="distributed", units=("layers.0", "layers.1"))
        train_with_engine(recipe_of(12, weights=weights), strategy, steps=1)


def test_an_aligned_copy_keeps_strides_offset_and_sharing() -> None:
    base = at(4, torch.arange(24.0))
    transposed, expanded = base[6:].view(3, 6).t(), base[:1].expand(5)
    copies: dict[int, torch.UntypedStorage] = {}
    results = [with_aligned_storage(tensor, copies) for tensor in (base, transposed, expanded)]
    for result, tensor in zip(results, (base, transposed, expanded), strict=True):
        assert torch.equal(result, tensor)
        assert (result.stride(), result.storage_offset()) == (tensor.stride(), tensor.storage_offset())
        assert result.untyped_storage().data_ptr() % ALIGNMENT == 0
    results[0].fill_(7)
    assert torch.equal(results[2], torch.full((5,), 7.0))
    aligned = torch.zeros(5)
    assert with_aligned_storage(aligned) is aligned
    assert with_aligned_storage(aligned[1:]).data_ptr() == aligned.data_ptr() + 4
