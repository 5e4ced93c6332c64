"""What a checkpoint contains; writes it in the background.

A folder that all workers write at once, in the background: it appears whole or not at all (see `publish`).
Every worker writes its files where they can't be seen yet and then, as a file, what the manifest must say of them. When
all of those are there worker 0 writes the manifest and publishes the folder. Nothing of this is a collective call, so
training goes on meanwhile.

What a checkpoint is made of: every worker writes the ranges that it owns.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manyhands.checkpoint.format import (
    CHECKPOINT_FORMAT,
    FrozenManifest,
    Manifest,
    PieceRecord,
    Scalar,
    TensorRecord,
    decode_state,
    encode_state,
    folder_name,
    list_checkpoints,
    piece_file_name,
    read_frozen_manifest,
    read_manifest,
)
from manyhands.checkpoint.pieces import TensorPiece, check_type, write_pieces
from manyhands.checkpoint.publish import (
    as_checkpoint_error,
    create_partial,
    partial_folder,
    publish_folder,
    remove_checkpoint,
)
from manyhands.checkpoint.tensor_file import dtype_name
from manyhands.checkpoint.weight_files import config_files
from manyhands.comm.group import Group
from manyhands.engine.agreement import all_gather_json
from manyhands.engine.engine import StepEngine
from manyhands.errors import CheckpointError, ManyhandsError
from manyhands.storage.location import Location, names_in, put_text

MOST_SECONDS_BETWEEN_LOOKS = 1.0
"""Before that it looks after a tenth of what it has waited: it is late by that much, and never looks often."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Of a folder. write: writes this worker's files into the folder that it is given, and returns what worker 0 must
    know to make the manifest from everyone's; published: called on worker 0, when it's there."""

    write: Callable[[Location], dict[str, Any]]
    manifest_of: Callable[[list[dict[str, Any]]], BaseModel]
    published: Callable[[], None] = lambda: None


class Saving:
    """The folder `final` on its way, in place of what is there. Making one is collective, and so is `wait`."""

    def __init__(self, final: Location, group: Group, contents: Contents, tag: str) -> None:
        self.final = final
        self._group, self._contents, self._tag = group, contents, tag
        self._error: BaseException | None = None
        self._is_written = threading.Event()
        self._is_abandoned = threading.Event()
        attempt = secrets.token_hex(8)  # worker 0's: no leftover of another attempt is taken for one of this
        self._partial = partial_folder(final, attempt)
        if group.rank == 0:
            try:
                with as_checkpoint_error(self._partial):
                    create_partial(self._partial, final.parent)
            except CheckpointError as error:
                self._error = error
        everyone: list[Any] = all_gather_json(group, attempt, f"{tag} begins / control")
        self._partial = partial_folder(final, everyone[0])
        self._thread = threading.Thread(target=self._save, name="manyhands-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this worker has nothing more to do for it."""
        return not self._thread.is_alive()

    def wait_written(self) -> None:
        """Until this worker's files are written, or can't be: what it saves may change again."""
        self._is_written.wait()

    def wait(self) -> Location:
        """Until it's published. Raises the CheckpointError of one worker on all of them; then nothing is published."""
        self._is_written.wait()
        self._raise_any(f"{self._tag} written / control")
        self._thread.join()  # everyone's part is there: it only has to be published
        self._raise_any(f"{self._tag} published / control")
        return self.final

    def abandon(self) -> None:
        """Nobody waits for it any more: it's published if all have written, else a part of it is left hidden."""
        self._is_abandoned.set()

    def _raise_any(self, tag: str) -> None:
        said = [*map(str, _words_of(self._error))]
        everyone: list[Any] = all_gather_json(self._group, said, tag)
        for rank, words in enumerate(everyone):
            if words:
                self._is_abandoned.set()
                self._thread.join()
                if rank == self._group.rank and self._error is not None:
                    raise self._error
                what, where, hint = words
                raise CheckpointError(what, where=where, hint=hint)

    def _save(self) -> None:
        try:
            if self._error is None:
                with as_checkpoint_error(self._partial):
                    mine = self._contents.write(self._partial)
                    put_text(self._partial / f"part-{self._group.rank}.json", json.dumps(mine))
            self._is_written.set()
            if self._group.rank == 0 and self._error is None:
                self._publish()
        except BaseException as error:
            self._error = error
            with suppress(OSError):
                put_text(self._partial / f"failed-{self._group.rank}", "")
        finally:
            self._is_written.set()

    def _publish(self) -> None:
        with as_checkpoint_error(self.final):
            if self._have_all_written():
                parts = [self._partial / f"part-{rank}.json" for rank in range(self._group.size)]
                everyone = [json.loads(part.read_text()) for part in parts]
                for part in parts:
                    part.unlink()
                publish_folder(self._partial, self.final, self._contents.manifest_of(everyone))
                self._contents.published()

    def _have_all_written(self) -> bool:
        """Wait until everyone has; False: someone can't, or nobody waits for it any more."""
        wanted = {f"part-{rank}.json" for rank in range(self._group.size)}
        failed = {f"failed-{rank}" for rank in range(self._group.size)}
        began = time.monotonic()
        while wanted - (names := names_in(self._partial)):
            if names & failed or self._is_abandoned.is_set():
                return False
            time.sleep(min(MOST_SECONDS_BETWEEN_LOOKS, 0.005 + (time.monotonic() - began) / 10))
        return True


def _words_of(error: BaseException | None) -> tuple[str, ...]:
    """What an error says, to be said by others, too; nothing of none."""
    if error is None:
        return ()
    if isinstance(error, ManyhandsError):
        return error.what, error.where or "", error.hint or ""
    return f"the checkpoint can't be written: {type(error).__name__}: {error}", "", "see the worker's log"


Scalars = dict[str, dict[str, dict[str, Any]]]
"""By parameter and kind: a Scalar, as JSON has it."""

FROZEN_PIECE_NUMEL = 1 << 20
"""Elements in a piece of a frozen parameter: what a reader has in memory at once."""


def begin_checkpoint(
    engine: StepEngine,
    root: Location,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
    published: Callable[[Location], None] | None = None,
) -> Saving | None:
    """Begin to write the engine's state, as it is now, to a new folder in `root`; None if it's there. Collective.

    keep, keep_every: which checkpoints to leave in `root`: the last `keep` (None: all), and those of every
    `keep_every`-th step. One of this step with the same weights stays; one with others is replaced. Frozen parameters
    are written once, beside the first checkpoint, before this returns; so is state at a home that is apart, of which
    there's no copy in memory. What was published before is never touched by a failure. published: hears on worker 0, in
    the thread that writes, as soon as it's there. Raises CheckpointError.
    """
    group, step = engine.group, engine.step_index
    final = root / folder_name(step)
    tag = f"step {step} / checkpoint"
    group.status(f"checkpoint of step {step}", step)
    digest = engine.digest()
    if all(all_gather_json(group, _holds(final, digest), f"{tag} / control")):
        return None
    manifest = manifest_of(engine, digest, _save_frozen(engine, root))
    scalars: Scalars = {}
    pieces = list(owned_pieces(engine, scalars))
    if not engine.allocator.on_disk:
        pieces = [piece._replace(tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in pieces]

    def write(folder: Location) -> dict[str, Any]:
        records = write_pieces(folder / name, pieces)
        return {"pieces": [record.model_dump() for record in records], "scalars": scalars}

    def is_published() -> None:
        if published is not None:
            published(final)
        _prune(final, keep, keep_every)

    name = _file_of(engine)
    contents = Contents(write=write, manifest_of=partial(with_pieces, manifest), published=is_published)
    saving = Saving(final, group, contents, tag)
    if engine.allocator.on_disk:
        saving.wait_written()
    return saving


def manifest_of(engine: StepEngine, digest: str, frozen: str | None) -> Manifest:
    """The engine's state as it is now, without what the workers add. frozen: see Manifest."""
    tensors, computed = tensor_records(engine)
    return Manifest(
        format=CHECKPOINT_FORMAT,
        step=engine.step_index,
        workers=engine.group.size,
        sharding=engine.strategy.sharding,
        facts=engine.facts(),
        identity=engine.identity,
        digest=digest,
        hyperparameters=engine.optimizer.hyperparameters(),
        schedules=[_schedule_state(schedule) for schedule in engine.schedules],
        scalars={},
        tensors=tensors,
        frozen=frozen,
        computed=computed,
        config_files=config_files(engine.model),
        pieces=[],
    )


def with_pieces(manifest: Manifest, everyone: list[dict[str, Any]]) -> Manifest:
    """The same with what all workers say of their pieces and numbers."""
    scalars = {
        name: {kind: Scalar(**number) for kind, number in numbers.items()}
        for theirs in everyone
        for name, numbers in theirs["scalars"].items()
    }
    return manifest.model_copy(update={"scalars": scalars, "pieces": _joined(everyone)})


def _prune(final: Location, keep: int | None, keep_every: int | None) -> None:
    for step, old in list_checkpoints(final.parent)[: -keep if keep else 0]:
        if old != final and not (keep_every and step % keep_every == 0):
            remove_checkpoint(old)


def _file_of(engine: StepEngine) -> str:
    return piece_file_name(engine.group.rank)


def _joined(everyone: list[dict[str, Any]]) -> list[PieceRecord]:
    return [PieceRecord(**record) for theirs in everyone for record in theirs["pieces"]]


def owned_pieces(engine: StepEngine, scalars: Scalars) -> Iterator[TensorPiece]:
    """What this worker owns: views of its state; fills in `scalars`."""
    for piece, owned in engine.updater.slices:
        if not owned.numel:
            continue
        cut, start = slice(owned.start, owned.end), piece.start + owned.start
        yield TensorPiece("master", piece.name, start, piece.master.view(-1)[cut])
        for kind, value in engine.optimizer.state_of(piece).items():
            if isinstance(value, Tensor) and value.dim() and value.shape == piece.master.shape:
                yield TensorPiece(kind, piece.name, start, value.reshape(-1)[cut])
            elif isinstance(value, Tensor) and value.dim() and piece.name in engine.optimizer.unsplittable:
                yield TensorPiece(kind, piece.name, 0, value.reshape(-1), tuple(value.shape))
            elif value is not None:
                scalars.setdefault(piece.name, {})[kind] = _scalar(value).model_dump()
    if engine.group.rank == 0:
        for name, buffer in engine.buffers.named().items():
            yield TensorPiece("buffer", name, 0, buffer.reshape(-1))


def tensor_records(engine: StepEngine) -> tuple[list[TensorRecord], list[str]]:
    """All tensors of the model with their names in its state_dict, and the names there of what isn't one of them."""
    keys: dict[int, list[str]] = {}
    state = engine.model.state_dict(keep_vars=True)
    for key, value in state.items():
        if isinstance(value, Tensor):
            keys.setdefault(id(value), []).append(key)
    records, trained = [], {name for name, _ in engine.digest_names}
    for name, tensor in [*engine.model.named_parameters(), *engine.model.named_buffers()]:
        is_param = name in engine.param_shapes
        may_change = not is_param or name in engine.buffers.frozen
        check_type("parameter" if is_param else "buffer", name, tensor.dtype)
        record = TensorRecord(
            kind="buffer" if may_change else "master" if name in trained else "frozen",
            name=name,
            is_parameter=is_param,
            shape=tuple(engine.param_shapes[name] if is_param else tensor.shape),
            dtype=dtype_name(tensor.dtype),
            keys=tuple(keys.pop(id(tensor), [])),
        )
        records.append(record)
    return records, [key for others in keys.values() for key in others]


def _save_frozen(engine: StepEngine, root: Location) -> str | None:
    """Write the parameters that no step changes, unless they are there; the folder's name. Collective.

    The name comes from what is in it, so that runs of several recipes in one folder don't get in each other's way.
    """
    tag = f"step {engine.step_index} / frozen"
    frozen = [record for record in tensor_records(engine)[0] if record.kind == "frozen"]
    if not frozen:
        return None
    facts = engine.facts()
    said = [(record.name, record.shape, record.dtype, facts[f"frozen parameter {record.name}"]) for record in frozen]
    final = root / f"frozen-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"
    if not all(all_gather_json(engine.group, _is_there(final), f"{tag} / control")):
        params = dict(engine.model.named_parameters())

        def write(folder: Location) -> dict[str, Any]:
            mine = list(_frozen_pieces({record.name: params[record.name] for record in frozen}, engine))
            records = write_pieces(folder / _file_of(engine), mine)
            return {"pieces": [record.model_dump() for record in records]}

        def joined(everyone: list[dict[str, Any]]) -> FrozenManifest:
            return FrozenManifest(format=CHECKPOINT_FORMAT, pieces=_joined(everyone))

        Saving(final, engine.group, Contents(write=write, manifest_of=joined), tag).wait()
    return final.name


def _frozen_pieces(params: dict[str, torch.nn.Parameter], engine: StepEngine) -> Iterator[TensorPiece]:
    """A worker writes its shard of those that are sharded, and of the others, which every worker has, its share."""
    sharded = set()
    for unit in engine.frozen_units:
        sharded |= {slot.name for slot in unit.layout.slots}
        for piece in unit.layout.pieces(unit.layout.shard(engine.group.rank)):
            yield from _cut(piece.slot.name, piece.in_param.start, unit.params.kept(piece.in_unit))
    number = 0
    for name, param in params.items():
        if name not in sharded:
            for cut in _cut(name, 0, param.detach().reshape(-1)):
                if number % engine.group.size == engine.group.rank:
                    yield cut
                number += 1


def _cut(name: str, first: int, values: Tensor) -> Iterator[TensorPiece]:
    for start in range(0, values.numel(), FROZEN_PIECE_NUMEL):
        yield TensorPiece("frozen", name, first + start, values[start : start + FROZEN_PIECE_NUMEL])


def _scalar(value: Tensor | float | int | bool) -> Scalar:
    if isinstance(value, Tensor):
        return Scalar(value=value.item(), dtype=dtype_name(value.dtype), device=value.device.type)
    return Scalar(value=value)


def _schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    state: dict[str, Any] = schedule.state_dict()
    encoded: dict[str, Any] = encode_state(state)
    if decode_state(json.loads(json.dumps(encoded))) != state:
        raise CheckpointError(
            f"the state of the schedule {type(schedule).__qualname__} can't be written down exactly",
            got=", ".join(state),
            hint="use a schedule whose state_dict() holds numbers, texts, lists and dicts of them",
        )
    return encoded


def _holds(folder: Location, digest: str) -> bool:
    """Whether the checkpoint in `folder` is there and has these weights."""
    try:
        return read_manifest(folder).digest == digest
    except CheckpointError:
        return False


def _is_there(frozen: Location) -> bool:
    try:
        read_frozen_manifest(frozen)
    except CheckpointError:
        return False
    return True
