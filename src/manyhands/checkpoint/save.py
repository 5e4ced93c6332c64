"""Collects the contents of a checkpoint and writes them in the background.

All workers write at the same time; each worker writes the ranges that it owns. They write to a hidden folder, which is
published complete or not at all (see `publish`). After its tensors, each worker writes its part of the manifest to a
file. When all of these files exist, worker 0 writes the manifest and publishes the folder. This takes no collective
call, so training continues meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manyhands.checkpoint.adapters import adapter_of
from manyhands.checkpoint.extra_state import check_extra_states, extra_states, modules_with_state
from manyhands.checkpoint.format import (
    AVERAGE,
    CHECKPOINT_FORMAT,
    FrozenManifest,
    Manifest,
    PieceRecord,
    Scalar,
    TensorRecord,
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
    publish_checkpoint,
    remove_checkpoint,
)
from manyhands.checkpoint.weight_files import config_files
from manyhands.comm.agreement import all_gather_json
from manyhands.comm.group import Group
from manyhands.engine.step.buffers import names_in_order
from manyhands.engine.step_engine import StepEngine
from manyhands.errors import CheckpointError, ManyhandsError
from manyhands.optim.plain_values import encode_state, exactly_encoded
from manyhands.output import say
from manyhands.storage.atomic import write_atomic
from manyhands.storage.files import names_in
from manyhands.storage.location import Location
from manyhands.storage.tensor_file import dtype_name

MAX_POLL_SECONDS = 1.0
"""The longest pause between two checks for the other workers' parts.

A pause is a tenth of the time waited so far. So polling delays publishing by at most about a tenth, and does not load
the file system.
"""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a folder that is to be written.

    write: writes this worker's files to the given folder, and returns the worker's part of the manifest as JSON values.
    manifest_of: builds the manifest from the parts of all workers. published: called on worker 0 after the folder is
    published.
    """

    write: Callable[[Location], dict[str, Any]]
    manifest_of: Callable[[list[dict[str, Any]]], BaseModel]
    published: Callable[[], None] = lambda: None


class Saving:
    """Writes the folder `final` in the background. An existing folder is replaced.

    The constructor and `wait` are collective.
    """

    def __init__(self, final: Location, group: Group, contents: Contents, tag: str) -> None:
        self.final = final
        self._group, self._contents, self._tag = group, contents, tag
        self._error: BaseException | None = None
        self._is_written = threading.Event()
        self._is_abandoned = threading.Event()
        # All workers use worker 0's value, which separates the files of different attempts.
        attempt = secrets.token_hex(8)
        self._partial = partial_folder(final, attempt)
        if group.rank == 0:
            try:
                with as_checkpoint_error(self._partial):
                    create_partial(self._partial, final.parent)
            except CheckpointError as error:
                self._error = error
        attempts: list[Any] = all_gather_json(group, attempt, f"{tag} starts / control")
        self._partial = partial_folder(final, attempts[0])
        self._thread = threading.Thread(target=self._save, name="manyhands-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Return True if this worker has nothing left to write or publish."""
        return not self._thread.is_alive()

    def wait_written(self) -> None:
        """Wait until this worker has written its files or failed to write them.

        The saved state may then change again.
        """
        self._is_written.wait()

    def wait(self) -> Location:
        """Wait until the folder is published. If a worker fails, all workers raise its CheckpointError. Collective."""
        self._is_written.wait()
        self._raise_any(f"{self._tag} written / control")
        self._thread.join()  # all parts exist; worker 0 only has to publish them
        self._raise_any(f"{self._tag} published / control")
        return self.final

    def abandon(self) -> None:
        """Stop waiting for other workers. The folder is published if all parts exist; otherwise it stays hidden."""
        self._is_abandoned.set()

    def _raise_any(self, tag: str) -> None:
        report = [*map(str, _report_of(self._error))]
        reports: list[Any] = all_gather_json(self._group, report, tag)
        for rank, report in enumerate(reports):
            if report:
                self._is_abandoned.set()
                self._thread.join()
                if rank == self._group.rank and self._error is not None:
                    raise self._error
                what, where, hint = report
                raise CheckpointError(what, where=where, hint=hint)

    def _save(self) -> None:
        try:
            if self._error is None:
                with as_checkpoint_error(self._partial):
                    part = self._contents.write(self._partial)
                    # Only worker 0 of this run reads this file, so it need not survive a crash.
                    write_atomic(self._partial / f"part-{self._group.rank}.json", json.dumps(part), durable=False)
            self._is_written.set()
            if self._group.rank == 0 and self._error is None:
                self._publish()
        except BaseException as error:
            self._error = error
            with suppress(OSError):
                write_atomic(self._partial / f"failed-{self._group.rank}", "", durable=False)
        finally:
            self._is_written.set()

    def _publish(self) -> None:
        with as_checkpoint_error(self.final):
            if self._have_all_written():
                files = [self._partial / f"part-{rank}.json" for rank in range(self._group.size)]
                parts = [json.loads(file.read_text()) for file in files]
                for file in files:
                    file.unlink()
                publish_checkpoint(self._partial, self.final, self._contents.manifest_of(parts))
                self._contents.published()

    def _have_all_written(self) -> bool:
        """Wait until all workers have written their parts.

        Return False if a worker failed, or if this save was abandoned.
        """
        expected = {f"part-{rank}.json" for rank in range(self._group.size)}
        failed = {f"failed-{rank}" for rank in range(self._group.size)}
        started = time.monotonic()
        while expected - (names := set(names_in(self._partial, missing_ok=False))):
            if names & failed or self._is_abandoned.is_set():
                return False
            time.sleep(min(MAX_POLL_SECONDS, 0.005 + (time.monotonic() - started) / 10))
        return True


def _report_of(error: BaseException | None) -> tuple[str, ...]:
    """Return (what, where, hint), from which other workers can raise the same error, or () if there is no error."""
    if error is None:
        return ()
    if isinstance(error, ManyhandsError):
        return error.what, error.where or "", error.hint or ""
    return f"the checkpoint can't be written: {type(error).__name__}: {error}", "", "see the worker's log"


Scalars = dict[str, dict[str, dict[str, Any]]]
"""The numbers in the optimizer's state: parameter -> kind -> the fields of a `Scalar`."""

FROZEN_PIECE_NUMEL = 1 << 20
"""The number of elements in a piece of a frozen parameter. A reader holds one piece in memory."""


def start_checkpoint(
    engine: StepEngine,
    root: Location,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
    best: Collection[int] = (),
    without: Collection[str] = (),
    published: Callable[[Location], None] | None = None,
) -> Saving | None:
    """Start to write the engine's current state to a new folder in `root`. Collective.

    Returns None if `root` already has a checkpoint of this step with the same weights. A checkpoint with other weights
    is replaced. keep, keep_every: `root` keeps the last `keep` checkpoints (None: all), and those of every
    `keep_every`-th step. best: it also keeps the checkpoints of these steps. without: the kinds of tensors to leave
    out. published: called on worker 0 with the folder as soon as it exists, in the thread that writes.

    This function returns only after two parts are written: frozen parameters, which are written once, next to the first
    checkpoint, and state that is offloaded to disk, because it is not copied to memory. A failure leaves published
    checkpoints unchanged. Raises CheckpointError.
    """
    group, step = engine.group, engine.step_index
    final = root / folder_name(step)
    tag = f"step {step} / checkpoint"
    group.status(f"checkpoint of step {step}", step)
    digest = engine.digest()
    check_extra_states(engine.model, group)
    if all(all_gather_json(group, _holds(final, digest), f"{tag} / control")):
        return None
    manifest = manifest_of(engine, digest, _save_frozen(engine, root))
    scalars: Scalars = {}
    pieces = [piece for piece in owned_pieces(engine, scalars) if piece.kind not in without]
    position = engine.stream_position()
    if not engine.allocator.on_disk:
        pieces = [piece._replace(tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in pieces]

    def write(folder: Location) -> dict[str, Any]:
        records = write_pieces(folder / name, pieces)
        return part_of(records, scalars, position)

    def is_published() -> None:
        if published is not None:
            published(final)
        _prune(final, keep, keep_every, best)

    name = _file_of(engine)
    contents = Contents(write=write, manifest_of=partial(with_pieces, manifest), published=is_published)
    saving = Saving(final, group, contents, tag)
    if engine.allocator.on_disk:
        saving.wait_written()
    return saving


def manifest_of(engine: StepEngine, digest: str, frozen: str | None) -> Manifest:
    """Return the manifest of the engine's current state, without pieces and scalars. `Manifest` describes `frozen`."""
    tensors, computed = tensor_records(engine)
    past, changed = engine.amendments.up_to(engine.step_index), engine.optimizer.changed_attributes()
    return Manifest(
        format=CHECKPOINT_FORMAT,
        step=engine.step_index,
        workers=engine.group.size,
        sharding=engine.strategy.sharding,
        facts=engine.facts(),
        identity=engine.identity,
        digest=digest,
        hyperparameters=[encode_state(group) for group in engine.optimizer.hyperparameters()],
        attributes=[encode_state(each) for each in changed] if any(changed) else [],
        schedules=[_schedule_state(schedule) for schedule in engine.schedules],
        scalars={},
        tensors=tensors,
        frozen=frozen,
        computed=computed,
        config_files=config_files(engine.model),
        pieces=[],
        extra_states=extra_states(engine.model).values,
        amendments=past.as_json() if past else {},
        progress=encode_state(engine.progress),
        user_state=_user_state(engine),
        averaged=engine.updater.average.count,
        adapter=adapter_of(engine.model),
        island=engine.island,
    )


def part_of(records: Sequence[PieceRecord], scalars: Scalars, position: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's part of the manifest as JSON values."""
    return {"pieces": [record.model_dump() for record in records], "scalars": scalars, "stream": position}


def with_pieces(manifest: Manifest, parts: list[dict[str, Any]]) -> Manifest:
    """Return the manifest with the pieces, scalars and positions in a stream of all workers. Equal positions are kept
    once, because they may hold the states of many parts.
    """
    scalars = {
        name: {kind: Scalar(**number) for kind, number in numbers.items()}
        for part in parts
        for name, numbers in part["scalars"].items()
    }
    stream: list[dict[str, Any]] = []
    for part in parts:
        if part["stream"] and part["stream"] not in stream:
            stream.append(part["stream"])
    return manifest.model_copy(update={"scalars": scalars, "pieces": _pieces_in(parts), "stream": stream})


def _prune(final: Location, keep: int | None, keep_every: int | None, best: Collection[int]) -> None:
    """Delete old checkpoints. A link stays and is not counted, because Manyhands did not make it.

    A checkpoint that can't be deleted is reported, but the save still succeeds.
    """
    mine = [
        (step, old) for step, old in list_checkpoints(final.parent) if not (isinstance(old, Path) and old.is_symlink())
    ]
    for step, old in mine[: -keep if keep else 0]:
        if old != final and step not in best and not (keep_every and step % keep_every == 0):
            try:
                remove_checkpoint(old)
            except OSError as error:
                say(f"the old checkpoint {old} can't be deleted: {error.strerror or error}")


def _file_of(engine: StepEngine) -> str:
    return piece_file_name(engine.group.rank)


def _pieces_in(parts: list[dict[str, Any]]) -> list[PieceRecord]:
    return [PieceRecord(**record) for part in parts for record in part["pieces"]]


def owned_pieces(engine: StepEngine, scalars: Scalars) -> Iterator[TensorPiece]:
    """Yield the tensors that this worker owns, as views of its state. Add the numbers that it owns to `scalars`."""
    for piece, owned in engine.updater.slices:
        if not owned.numel:
            continue
        part, start = slice(owned.start, owned.end), piece.start + owned.start
        yield TensorPiece("master", piece.name, start, piece.master.view(-1)[part])
        if piece.average is not None and engine.updater.average.has_begun:
            yield TensorPiece(AVERAGE, piece.name, start, piece.average[part])
        for kind, tensor in piece.companions.items():
            yield TensorPiece(kind, piece.name, start, tensor[part])
        for kind, value in engine.optimizer.state_of(piece).items():
            if isinstance(value, Tensor) and value.dim() and value.shape == piece.master.shape:
                yield TensorPiece(kind, piece.name, start, value.reshape(-1)[part])
            elif isinstance(value, Tensor) and value.dim() and piece.name in engine.optimizer.unsplittable:
                yield TensorPiece(kind, piece.name, 0, value.reshape(-1), tuple(value.shape))
            else:
                scalars.setdefault(piece.name, {})[kind] = _scalar(value).model_dump()
    if engine.group.rank == 0:
        for name, buffer in engine.buffers.named().items():
            yield TensorPiece("buffer", name, 0, buffer.reshape(-1))
        yield from extra_states(engine.model).tensors


def tensor_records(engine: StepEngine) -> tuple[list[TensorRecord], list[str]]:
    """Return the model's parameters and buffers in the order of its state_dict, and the names of the other tensors in
    it.

    Hooks or an overridden `state_dict` add these other tensors. Extra states of modules are not among them.
    """
    keys: dict[int, list[str]] = {}
    state, extra = engine.model.state_dict(keep_vars=True), dict(modules_with_state(engine.model))
    for key, value in state.items():
        if isinstance(value, Tensor) and key not in extra:
            keys.setdefault(id(value), []).append(key)
    records, trained = [], {name for name, _ in engine.trained}
    tensors = dict([*engine.model.named_parameters(), *engine.model.named_buffers()])
    for name in names_in_order(engine.model):
        tensor = tensors[name]
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
    """Write the parameters that no step changes, unless they have been written before. Return the folder's name.
    Collective.

    The name contains a hash of the parameters, so runs of several recipes can share a root folder.
    """
    tag = f"step {engine.step_index} / frozen"
    frozen = [record for record in tensor_records(engine)[0] if record.kind == "frozen"]
    if not frozen:
        return None
    facts = engine.facts()
    identity = [
        (record.name, record.shape, record.dtype, facts[f"frozen parameter {record.name}"]) for record in frozen
    ]
    final = root / f"frozen-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    if not all(all_gather_json(engine.group, _is_complete(final), f"{tag} / control")):
        params = dict(engine.model.named_parameters())

        def write(folder: Location) -> dict[str, Any]:
            pieces = list(_frozen_pieces({record.name: params[record.name] for record in frozen}, engine))
            records = write_pieces(folder / _file_of(engine), pieces)
            return {"pieces": [record.model_dump() for record in records]}

        def frozen_manifest(parts: list[dict[str, Any]]) -> FrozenManifest:
            return FrozenManifest(format=CHECKPOINT_FORMAT, pieces=_pieces_in(parts))

        Saving(final, engine.group, Contents(write=write, manifest_of=frozen_manifest), tag).wait()
    return final.name


def _frozen_pieces(params: dict[str, torch.nn.Parameter], engine: StepEngine) -> Iterator[TensorPiece]:
    """Yield this worker's shard of sharded parameters, and its share of the parameters that every worker holds in
    full.
    """
    sharded = set()
    for unit in engine.frozen_units:
        sharded |= {slot.name for slot in unit.layout.slots}
        for part in unit.layout.pieces(unit.layout.shard(engine.group.rank)):
            yield from _split(part.slot.name, part.in_param.start, unit.params.stored(part.in_unit))
    number = 0
    for name, param in params.items():
        if name not in sharded:
            for piece in _split(name, 0, param.detach().reshape(-1)):
                if number % engine.group.size == engine.group.rank:
                    yield piece
                number += 1


def _split(name: str, first: int, values: Tensor) -> Iterator[TensorPiece]:
    for start in range(0, values.numel(), FROZEN_PIECE_NUMEL):
        yield TensorPiece("frozen", name, first + start, values[start : start + FROZEN_PIECE_NUMEL])


def _scalar(value: Tensor | float | int | bool | str | None) -> Scalar:
    if isinstance(value, Tensor):
        return Scalar(value=value.item(), dtype=dtype_name(value.dtype), device=value.device.type, dims=value.dim())
    return Scalar(value=value)


def check_schedules(engine: StepEngine) -> None:
    """Raise CheckpointError if a checkpoint can't hold the state of a schedule."""
    for schedule in engine.schedules:
        _schedule_state(schedule)


def _schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    encoded: dict[str, Any] | None = exactly_encoded(schedule.state_dict())
    if encoded is None:
        raise CheckpointError(
            f"the state of the schedule {type(schedule).__qualname__} can't be saved exactly",
            got=", ".join(schedule.state_dict()),
            hint="use a schedule whose state_dict() holds only numbers, strings, and lists, tuples and dicts of them",
        )
    return encoded


def _user_state(engine: StepEngine) -> dict[str, Any]:
    encoded: dict[str, Any] | None = exactly_encoded(engine.extra_state)
    if encoded is None:
        raise CheckpointError(
            "engine.extra_state can't be saved exactly",
            expected="a dict of numbers, texts, and lists, tuples and dicts of them",
            got=repr(engine.extra_state)[:200],
        )
    return encoded


def _holds(folder: Location, digest: str) -> bool:
    """Return True if `folder` has a checkpoint with these weights."""
    try:
        return read_manifest(folder).digest == digest
    except CheckpointError:
        return False


def _is_complete(frozen: Location) -> bool:
    try:
        read_frozen_manifest(frozen)
    except CheckpointError:
        return False
    return True
