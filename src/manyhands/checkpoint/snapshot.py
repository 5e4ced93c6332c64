"""Snapshots: state in shared memory that outlives the workers.

The workers' parent makes files without a name (memfd) and holds them: two slots, in each a file for every worker's
pieces and one for the record, which says what lies where. Workers open them through /proc. They write the slot that is
older; when all have, worker 0 writes the record. So at every moment one slot is whole, whoever is killed; and when the
parent ends, the kernel frees the memory. (As Gemini does, Wang et al., SOSP 2023, section 3, on one host.)

The record also says whose it is: a script may train more than once, and what one training left is none of another's.
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
from manyhands.checkpoint.save import Scalars, manifest_of, owned_pieces, with_pieces
from manyhands.checkpoint.tensor_file import bytes_of, dtype_name, dtype_named
from manyhands.engine.agreement import all_gather_json
from manyhands.engine.engine import StepEngine
from manyhands.errors import InvariantError

SNAPSHOT_MEMORY_VARIABLE = "MANYHANDS_SNAPSHOT_MEMORY"
"""Where the workers' parent keeps memory for snapshots; set by it ("": it keeps none)."""

_HEAD_BYTES = 16  # of a record: its length and its checksum

_IN_MEMORY = "the memory of the workers' parent"


class SnapshotSlot(NamedTuple):
    """Where a snapshot is written: paths of the record and, by rank, of the pieces."""

    record: str
    pieces: tuple[str, ...]


class Training(NamedTuple):
    """Whose a snapshot is. number: which of those that the script makes, from 0; directory: of the run, "" for none."""

    number: int
    directory: str


FIRST = Training(0, "")


class Snapshot(NamedTuple):
    """What is in a slot."""

    slot: SnapshotSlot
    of: Training
    manifest: Manifest


class SnapshotMemory:
    """The two slots, as the workers' parent and they see them. of: the training whose they are; None: any."""

    def __init__(
        self, slots: tuple[SnapshotSlot, ...], descriptors: tuple[int, ...] = (), of: Training | None = None
    ) -> None:
        self._slots, self._descriptors, self.of = slots, descriptors, of
        self._next: int | None = None  # which one is written next, by this worker

    @classmethod
    def create(cls, workers: int) -> SnapshotMemory:
        """For up to so many workers, held by this process until `close`; empty files take no memory."""
        made: list[int] = []

        def new() -> str:
            made.append(os.memfd_create("manyhands-snapshot", os.MFD_CLOEXEC))
            return f"/proc/{os.getpid()}/fd/{made[-1]}"

        slots = tuple(SnapshotSlot(new(), tuple(new() for _ in range(workers))) for _ in range(2))
        return cls(slots, tuple(made))

    def address(self) -> str:
        """A text by which the workers find it."""
        return json.dumps(self._slots)

    @classmethod
    def at(cls, address: str, of: Training = FIRST) -> SnapshotMemory:
        """What another process made, for one training."""
        return cls(tuple(SnapshotSlot(record, tuple(pieces)) for record, pieces in json.loads(address)), of=of)

    def close(self) -> None:
        """Free it, once no worker is left."""
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = ()

    def newest(self) -> Snapshot | None:
        """The last whole snapshot, if there is one."""
        whole = [snapshot for snapshot in map(self._in, self._slots) if snapshot is not None]
        return max(whole, key=lambda snapshot: (snapshot.of.number, snapshot.manifest.step), default=None)

    def next_slot(self) -> SnapshotSlot:
        """The one to write now: empty, another training's, or the older one."""
        if self._next is None:
            steps = [-1 if snapshot is None else snapshot.manifest.step for snapshot in map(self._in, self._slots)]
            self._next = steps.index(min(steps))
        slot, self._next = self._slots[self._next], 1 - self._next
        return slot

    def held_bytes(self) -> int:
        """How much memory the slots take now."""
        return sum(os.stat(path).st_blocks * 512 for slot in self._slots for path in (slot.record, *slot.pieces))

    def free(self) -> None:
        """Give the slots' memory back: they are empty then. For one worker, when none reads them any more."""
        for slot in self._slots:
            for path in (slot.record, *slot.pieces):  # the record first: killed amid this, no part is taken for whole
                os.truncate(path, 0)

    def _in(self, slot: SnapshotSlot) -> Snapshot | None:
        snapshot = _read_record(slot)
        return snapshot if snapshot is None or self.of in (None, snapshot.of) else None


def take_snapshot(engine: StepEngine, memory: SnapshotMemory, digest: str | None) -> None:
    """Keep the engine's state as it is now. Collective.

    digest: of the weights, if it is known; then it's checked when the snapshot is loaded.
    """
    group, tag = engine.group, f"step {engine.step_index} / snapshot"
    group.status(f"snapshot of step {engine.step_index}", engine.step_index)
    slot, scalars = memory.next_slot(), Scalars()
    # By every worker: all have done it before worker 0 writes a record again. What was there may be the newest one of
    # another training: killed amid this, it must not be taken for whole.
    _write_head(slot, bytes(_HEAD_BYTES))
    records = _write(slot.pieces[group.rank], piece_file_name(group.rank), list(owned_pieces(engine, scalars)))
    mine = {"pieces": [record.model_dump() for record in records], "scalars": scalars}
    everyone: list[Any] = all_gather_json(group, mine, f"{tag} written / control")
    if group.rank == 0:
        _write_record(slot, memory.of, with_pieces(manifest_of(engine, digest or "", frozen=None), everyone))


def load_snapshot(engine: StepEngine, memory: SnapshotMemory) -> Manifest:
    """Make the engine's state that of the last snapshot. Collective."""
    newest = memory.newest()
    if newest is None:
        raise InvariantError("there is no snapshot", where=_IN_MEMORY)
    return restore(engine, SnapshotReader(newest))


def snapshot_bytes(engine: StepEngine) -> int:
    """How much of a slot this worker's pieces take."""
    return sum(piece.tensor.nbytes for piece in owned_pieces(engine, Scalars()))


class SnapshotReader(CheckpointReader):
    """Reads ranges of named tensors out of memory."""

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
                raise InvariantError("a snapshot is cut short", where=str(self.folder), got=piece.name)
        return part


def _write(path: str, name: str, pieces: list[TensorPiece]) -> list[PieceRecord]:
    """One piece after the other; in records, which call the file `name`, a piece's key is where it begins."""
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
    """Its head last: a record that was begun is none (`take_snapshot` has removed the head before)."""
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
    said = json.loads(text)
    if said["manifest"]["format"] != CHECKPOINT_FORMAT:
        return None
    return Snapshot(slot, Training(*said["of"]), Manifest.model_validate(said["manifest"]))
