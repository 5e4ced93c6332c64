"""Snapshots: state in shared memory that outlives the workers.

The workers' parent creates files without a name (memfd) and holds them open. The files form two slots. In each slot,
every worker has a file for its pieces, and one more file holds the record, which lists the positions of the pieces.
Workers open the files through /proc. They write their pieces to the older slot; when all have done so, worker 0 writes
the record. So one slot is always complete, whichever worker is killed. When the parent ends, the kernel frees the
memory. The method follows Gemini (Wang et al., SOSP 2023, section 3), but works on one host.

The record also names its training, because a script may train more than once, and must not load another training's
snapshot.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyhands.checkpoint.format import CHECKPOINT_FORMAT, Manifest, PieceRecord, piece_file_name
from manyhands.checkpoint.load import CheckpointReader, restore
from manyhands.checkpoint.pieces import PieceReader, TensorPiece
from manyhands.checkpoint.save import Scalars, manifest_of, owned_pieces, part_of, with_pieces
from manyhands.comm.agreement import all_gather_json
from manyhands.engine.step_engine import StepEngine
from manyhands.errors import InvariantError
from manyhands.storage.tensor_file import bytes_of, dtype_name, dtype_named

SNAPSHOT_MEMORY_VARIABLE = "MANYHANDS_SNAPSHOT_MEMORY"
"""The environment variable with the address of the parent's snapshot memory; "" if the parent has none."""

_HEAD_BYTES = 16  # the head of a record: its length and its checksum

_IN_MEMORY = "the memory of the workers' parent"


class SnapshotSlot(NamedTuple):
    """The files of a snapshot: the path of the record, and the paths of the pieces, by rank."""

    record: str
    pieces: tuple[str, ...]


class Training(NamedTuple):
    """The training that took a snapshot.

    number: its number in the script, from 0. directory: its run directory, or "".
    """

    number: int
    directory: str


FIRST = Training(0, "")


class Snapshot(NamedTuple):
    """The snapshot in a slot. of: the training that took it."""

    slot: SnapshotSlot
    of: Training
    manifest: Manifest


class SnapshotMemory:
    """The two slots, as the parent and the workers see them. of: the training whose snapshots are read, or None for
    any.
    """

    def __init__(
        self, slots: tuple[SnapshotSlot, ...], descriptors: tuple[int, ...] = (), of: Training | None = None
    ) -> None:
        self._slots, self._descriptors, self.of = slots, descriptors, of
        self._next: int | None = None  # the slot that this worker writes next

    @classmethod
    def create(cls, workers: int) -> SnapshotMemory:
        """Create slots for up to `workers` workers. They exist until `close`. Empty slots take no memory."""
        descriptors: list[int] = []

        def new() -> str:
            descriptors.append(os.memfd_create("manyhands-snapshot", os.MFD_CLOEXEC))
            return f"/proc/{os.getpid()}/fd/{descriptors[-1]}"

        slots = tuple(SnapshotSlot(new(), tuple(new() for _ in range(workers))) for _ in range(2))
        return cls(slots, tuple(descriptors))

    def address(self) -> str:
        """Return a text from which a worker can open this memory with `at`."""
        return json.dumps(self._slots)

    @classmethod
    def at(cls, address: str, of: Training = FIRST) -> SnapshotMemory:
        """Open the memory that another process created, for one training."""
        return cls(tuple(SnapshotSlot(record, tuple(pieces)) for record, pieces in json.loads(address)), of=of)

    def close(self) -> None:
        """Free the memory. Call this when no worker is left."""
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = ()

    def newest(self) -> Snapshot | None:
        """Return the last complete snapshot, or None if there is none."""
        complete = [snapshot for snapshot in map(self._in, self._slots) if snapshot is not None]
        return max(complete, key=lambda snapshot: (snapshot.of.number, snapshot.manifest.step), default=None)

    def next_slot(self) -> SnapshotSlot:
        """Return the slot to write next: an empty slot or a slot of another training if there is one, and otherwise the
        older slot.
        """
        if self._next is None:
            steps = [-1 if snapshot is None else snapshot.manifest.step for snapshot in map(self._in, self._slots)]
            self._next = steps.index(min(steps))
        slot, self._next = self._slots[self._next], 1 - self._next
        return slot

    def held_bytes(self) -> int:
        """Return the memory in bytes that the slots currently take."""
        return sum(os.stat(path).st_blocks * 512 for slot in self._slots for path in (slot.record, *slot.pieces))

    def free(self) -> None:
        """Empty the slots, which frees their memory.

        Only one worker calls this, when no worker reads the slots any more.
        """
        for slot in self._slots:
            # Truncate the record first: a kill in between must not leave a record without all of its pieces.
            for path in (slot.record, *slot.pieces):
                os.truncate(path, 0)

    def _in(self, slot: SnapshotSlot) -> Snapshot | None:
        snapshot = _read_record(slot)
        return snapshot if snapshot is None or self.of in (None, snapshot.of) else None


def take_snapshot(engine: StepEngine, memory: SnapshotMemory, digest: str | None) -> None:
    """Write a snapshot of the engine's current state. Collective.

    digest: the digest of the weights, if it is known. Loading the snapshot then checks it.
    """
    group, tag = engine.group, f"step {engine.step_index} / snapshot"
    group.status(f"snapshot of step {engine.step_index}", engine.step_index)
    slot, scalars = memory.next_slot(), Scalars()
    # Every worker clears the record's head before it writes its pieces. The slot may hold another training's newest
    # snapshot, which must not look complete if a worker is killed during the write.
    _write_head(slot, bytes(_HEAD_BYTES))
    records = _write(slot.pieces[group.rank], piece_file_name(group.rank), list(owned_pieces(engine, scalars)))
    part = part_of(records, scalars, engine.stream_position())
    parts: list[Any] = all_gather_json(group, part, f"{tag} written / control")
    if group.rank == 0:
        _write_record(slot, memory.of, with_pieces(manifest_of(engine, digest or "", frozen=None), parts))


def load_snapshot(engine: StepEngine, memory: SnapshotMemory) -> Manifest:
    """Load the newest snapshot into the engine. Collective."""
    newest = memory.newest()
    if newest is None:
        raise InvariantError("there is no snapshot", where=_IN_MEMORY)
    return restore(engine, SnapshotReader(newest))


def snapshot_bytes(engine: StepEngine) -> int:
    """Return the number of bytes that this worker's pieces take in a slot."""
    return sum(piece.tensor.nbytes for piece in owned_pieces(engine, Scalars()))


class SnapshotReader(CheckpointReader):
    """Reads ranges of a snapshot's tensors from memory."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.manifest = manifest = snapshot.manifest
        self._paths = {piece_file_name(rank): path for rank, path in enumerate(snapshot.slot.pieces)}
        PieceReader.__init__(self, Path(f"snapshot of step {manifest.step} in {_IN_MEMORY}"), manifest.pieces)

    def _read_piece(self, piece: PieceRecord, start: int, end: int) -> Tensor:
        part = torch.empty(end - start, dtype=dtype_named(piece.dtype))
        data = bytes_of(part)
        with open(self._paths[piece.file], "rb", buffering=0) as file:
            file.seek(int(piece.key) + start * part.itemsize)
            if data.nbytes and file.readinto(data) != data.nbytes:
                raise InvariantError("a snapshot is truncated", where=str(self.folder), got=piece.name)
        return part


def _write(path: str, name: str, pieces: list[TensorPiece]) -> list[PieceRecord]:
    """Write the pieces one after the other.

    Return their records, whose file is `name` and whose keys are positions in bytes.
    """
    records, start = [], 0
    with open(path, "r+b", buffering=0) as file:
        for piece in pieces:
            data = bytes_of(piece.tensor.detach().cpu())
            _write_all(file.fileno(), data, start)
            record = PieceRecord(
                file=name,
                key=str(start),
                kind=piece.kind,
                name=piece.name,
                start=piece.start,
                numel=piece.tensor.numel(),
                dtype=dtype_name(piece.tensor.dtype),
                shape=piece.shape,
                crc32=0,
            )
            records.append(record)
            start += data.nbytes
    return records


def _write_all(fd: int, data: memoryview, start: int) -> None:
    while data.nbytes:
        written = os.pwrite(fd, data, start)
        data, start = data[written:], start + written


def _write_record(slot: SnapshotSlot, of: Training | None, manifest: Manifest) -> None:
    """Write the record, with its head last.

    A partial record is not valid, because `take_snapshot` has cleared the old head.
    """
    text = json.dumps({"of": of or FIRST, "manifest": manifest.model_dump(mode="json")}).encode()
    with open(slot.record, "r+b", buffering=0) as file:
        _write_all(file.fileno(), memoryview(text), _HEAD_BYTES)
    _write_head(slot, len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(8, "little"))


def _write_head(slot: SnapshotSlot, head: bytes) -> None:
    with open(slot.record, "r+b", buffering=0) as file:
        _write_all(file.fileno(), memoryview(head), 0)


def _read_record(slot: SnapshotSlot) -> Snapshot | None:
    with open(slot.record, "rb", buffering=0) as file:
        head = file.read(_HEAD_BYTES)
        length, checksum = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
        text = file.read(length) if length else b""
    if not text or len(text) != length or zlib.crc32(text) != checksum:
        return None
    fields = json.loads(text)
    if fields["manifest"]["format"] != CHECKPOINT_FORMAT:
        return None
    return Snapshot(slot, Training(*fields["of"]), Manifest.model_validate(fields["manifest"]))
