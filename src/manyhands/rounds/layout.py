"""The layout of a round file: names, types and places of its tensors, and its header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from manyhands.errors import InvariantError
from manyhands.numerics.alignment import ALIGNMENT
from manyhands.rounds.codec import CODEC_BITS, codes_bytes, num_blocks
from manyhands.storage.tensor_file import CODES, TensorEntry, header_of, in_file_order

FORMAT = 1
"""The number of the format. It changes whenever the same contents would have other bytes."""

FP32_BITS = 32

Kind = Literal["weights", "delta"]

NO_DIGEST = "0" * 64


class RoundIdentity(NamedTuple):
    """What distinguishes a round file from others with the same layout.

    fingerprint: identifies the recipe. round, island: their numbers.
    """

    fingerprint: str
    round: int
    island: int


@dataclass(frozen=True)
class RoundLayout:
    """The tensors of a round file.

    params: names and numbers of elements. buffers: names, dtypes and shapes. bits: 8, 4 or 2 bits per value, or 32 for
    fp32. kind: what the values are: "delta", the change of the weights in the round, or "weights". Only fp32 values
    can be weights.

    For each parameter NAME there are "codes/NAME" and "scales/NAME" (see `codec`), or with 32 bits "delta/NAME" or
    "weights/NAME", F32 [numel]; for each buffer "buffers/NAME". Codes come first, in the order of `params`, because
    their sizes are multiples of 64 bytes. The other tensors are sorted by element size, largest first. So each tensor
    starts at a multiple of its element size.
    """

    params: Sequence[tuple[str, int]]
    buffers: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
    bits: int
    kind: Kind = "delta"

    def __post_init__(self) -> None:
        kinds = ("delta", "weights") if self.bits == FP32_BITS else ("delta",)
        if self.bits not in (*CODEC_BITS, FP32_BITS) or self.kind not in kinds:
            raise InvariantError("no such round file", got=f"{self.bits} bits for {self.kind}")
        for names in ([name for name, _ in self.params], [name for name, _, _ in self.buffers]):
            if len(set(names)) < len(names):
                raise InvariantError("two tensors of a round file have one name")
        unknown = [f"{name}: {dtype}" for name, dtype, _ in self.buffers if dtype not in CODES]
        if unknown:
            raise InvariantError("a buffer has a type that a round file can't hold", got=", ".join(unknown))

    @cached_property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The tensors in the order of the file."""
        codes, others = [], []
        for name, numel in self.params:
            if self.bits == FP32_BITS:
                others.append(TensorEntry(f"{self.kind}/{name}", torch.float32, (numel,)))
            else:
                codes.append(TensorEntry(f"codes/{name}", torch.uint8, (codes_bytes(numel, self.bits),)))
                others.append(TensorEntry(f"scales/{name}", torch.bfloat16, (num_blocks(numel),)))
        others += [TensorEntry(f"buffers/{name}", dtype, tuple(shape)) for name, dtype, shape in self.buffers]
        return (*codes, *in_file_order(others))

    @cached_property
    def places(self) -> dict[str, tuple[TensorEntry, int]]:
        """The tensors by name, each with the position of its first byte behind the header."""
        found, position = {}, 0
        for entry in self.entries:
            found[entry.name] = entry, position
            position += entry.nbytes
        return found

    @cached_property
    def data_bytes(self) -> int:
        """The size of all tensors."""
        return sum(entry.nbytes for entry in self.entries)

    def file_bytes(self, identity: RoundIdentity) -> int:
        """Return the size of a file."""
        return len(self.header(identity)) + self.data_bytes

    def metadata(self, identity: RoundIdentity, digest: str = NO_DIGEST) -> dict[str, str]:
        """Return the metadata in the header. digest: the SHA-256 of all bytes behind the header, in hex."""
        return {
            "format": str(FORMAT),
            "fingerprint": identity.fingerprint,
            "round": str(identity.round),
            "island": str(identity.island),
            "bits": str(self.bits),
            "sha256": digest,
        }

    def header(self, identity: RoundIdentity, digest: str = NO_DIGEST) -> bytes:
        """Return the header. Its length is a multiple of 64 bytes, and does not depend on the digest."""
        return header_of(self.entries, self.metadata(identity, digest), ALIGNMENT)
