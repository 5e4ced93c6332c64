"""Exports weights in Hugging Face's layout, as a stream.

    OUT/
        config.json                          the model's config, if it is a transformers model
        generation_config.json               the model's generation config, under the same condition
        model-00001-of-00002.safetensors     the weights; only model.safetensors if one file is enough
        model.safetensors.index.json         the file of each tensor
        extra_state.json                     the extra states of modules that are not tensors

Each piece is read from the checkpoint, checked, cast and written before the next one is read. The folder is written
under a hidden name. It gets its final name when it is complete and the digest of its weights equals the checkpoint's
digest.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manyhands.checkpoint.extra_state import KIND as EXTRA
from manyhands.checkpoint.extra_state import exported
from manyhands.checkpoint.format import (
    AVERAGE,
    MANIFEST,
    Manifest,
    TensorRecord,
    checkpoints_of,
    list_checkpoints,
    read_frozen_manifest,
    read_manifest,
)
from manyhands.checkpoint.owner import refusal, run_in
from manyhands.checkpoint.pieces import PieceReader, TensorPiece
from manyhands.checkpoint.tensor_file import TensorEntry, TensorFileWriter, dtype_name, dtype_named, in_file_order
from manyhands.checkpoint.weight_files import CONFIG, INDEX, SINGLE, config_text
from manyhands.config import PRECISIONS
from manyhands.errors import CheckpointError, ConfigError
from manyhands.numerics.digest import block_hashes, digest_of, tensor_hashes, words_of
from manyhands.options import nearest
from manyhands.shard_layout import BLOCK, blocks_of
from manyhands.storage.atomic import publish_folder, sync
from manyhands.storage.location import Location, location_of
from manyhands.validation import AVERAGED, TRAINED


class SavedWeights:
    """The tensors of a checkpoint under their names in the model's state_dict, in the dtypes to write.

    A tied tensor is stored only under its first name, the one in `named_parameters()`. Loaders tie it again.
    averaged: True for the average of the weights in place of the trained weights.
    """

    def __init__(self, folder: Location, cast: torch.dtype | None, *, averaged: bool = False) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self.averaged = averaged
        if averaged and not self.manifest.averaged:
            raise ConfigError(
                "the checkpoint has no average of the weights",
                where=str(folder),
                expected="a checkpoint of a run with an average, after the average has begun",
                got=self.manifest.facts.get("average of the weights", "a recipe without an average"),
                hint="export the trained weights, or a later checkpoint",
            )
        if self.manifest.computed:
            raise CheckpointError(
                f"the model's state_dict has tensors that are not parameters or buffers of the model: "
                f"{', '.join(self.manifest.computed[:5])}",
                where=str(folder),
                hint="a hook or an overridden state_dict() adds them, and checkpoints don't contain them",
            )
        self._pieces = PieceReader(folder, self.manifest.pieces)
        self._frozen = _frozen_reader(folder, self.manifest)
        self._records = {record.keys[0]: record for record in self.manifest.tensors if record.keys}
        self._digested = [record for record in self.manifest.tensors if _is_in_digest(record)]
        self._names = [(record.name, _words(record)) for record in self._digested]
        firsts = list(accumulate((blocks_of(words) for _, words in self._names), initial=0))
        self._first_blocks = {name: first for (name, _), first in zip(self._names, firsts[:-1], strict=True)}
        # Allocate one array at the start: small arrays between large temporary ones would fragment the heap.
        self._hashes = np.zeros(firsts[-1], dtype=np.int64)
        self.entries = [TensorEntry(key, _stored(record, cast), record.shape) for key, record in self._records.items()]
        self._extra, self.extra_states = exported(self.manifest.extra_states, self._pieces)
        pieces = {piece.name: piece for piece in self.manifest.pieces if piece.kind == EXTRA}
        for key, name in self._extra.items():
            self.entries.append(TensorEntry(key, dtype_named(pieces[name].dtype), pieces[name].shape or ()))
        self.dtype = next((entry.dtype for entry in self.entries if entry.dtype.is_floating_point), torch.float32)
        self.nbytes = sum(entry.nbytes for entry in self.entries)
        self.num_parameters = sum(record.numel for record in self._records.values() if record.is_parameter)

    def parts(self, entry: TensorEntry) -> Iterator[Tensor]:
        """Yield the elements of the tensor in parts, in order."""
        if entry.name in self._extra:
            yield self._pieces.read(EXTRA, self._extra[entry.name], 0, math.prod(entry.shape))
            return
        record = self._records[entry.name]
        reader = self._frozen if record.kind == "frozen" else self._pieces
        for piece in reader.parts(self._kind(record), record.name, record.numel):
            if _is_in_digest(record):
                self._hash(record, piece)
            yield piece.tensor.to(entry.dtype)

    def _kind(self, record: TensorRecord) -> str:
        """Return the kind of the pieces to read for a tensor."""
        return AVERAGE if self.averaged and record.kind == "master" else record.kind

    def _hash(self, record: TensorRecord, piece: TensorPiece) -> None:
        first, part = self._first_blocks[record.name] + piece.start // BLOCK, piece.tensor
        if record.kind == "buffer":  # stored in one piece
            hashes = tensor_hashes(part)
        else:
            # A piece starts at a block boundary, and ends at one or at the parameter's end.
            missing = -part.numel() % BLOCK
            hashes = block_hashes(torch.nn.functional.pad(part, (0, missing)) if missing else part).numpy()
        self._hashes[first : first + len(hashes)] = hashes

    def digest(self) -> str:
        """Return the digest of the weights, before any cast. Call it after reading all entries.

        Raises CheckpointError unless the trained weights are those that were saved. For the average, each piece was
        compared with its checksum when it was read.
        """
        for record in self._digested:
            if not record.keys:  # the model's state_dict leaves it out
                for piece in self._pieces.parts(self._kind(record), record.name, record.numel):
                    self._hash(record, piece)
        found = digest_of(self._names, self._hashes)
        if found != self.manifest.digest and not self.averaged:
            raise CheckpointError(
                "the loaded weights are not those that were saved",
                where=str(self.folder),
                expected=self.manifest.digest,
                got=found,
                hint="go back to an earlier checkpoint",
            )
        return found


def _is_in_digest(record: TensorRecord) -> bool:
    return record.kind == "master" or (record.kind == "buffer" and not record.is_parameter and bool(record.keys))


def _words(record: TensorRecord) -> int:
    return words_of(torch.empty(record.shape, dtype=getattr(torch, record.dtype), device="meta"))


def _stored(record: TensorRecord, cast: torch.dtype | None) -> torch.dtype:
    own: torch.dtype = getattr(torch, record.dtype)
    return own if cast is None or not (record.is_parameter and own.is_floating_point) else cast


def _frozen_reader(folder: Location, manifest: Manifest) -> PieceReader:
    if manifest.frozen is None:
        return PieceReader(folder, [])
    frozen = folder.absolute().parent / manifest.frozen
    if not frozen.is_dir():
        raise CheckpointError(
            "the checkpoint's frozen parameters are missing: their folder should be next to the checkpoint",
            where=str(frozen),
            hint="move that folder together with the checkpoint; or continue the run until its next checkpoint, "
            "which writes the folder again",
        )
    return PieceReader(frozen, read_frozen_manifest(frozen).pieces)


_PRECISION_DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True))

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

EXTRA_STATES = "extra_state.json"

ProgressCallback = Callable[[int, int], None]
"""A function that is called with the bytes of weights written so far, and the bytes of all weights."""


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """The result of an export.

    out: the folder. files: the names of its files, sorted. weights_bytes: the size of all tensors. dtype: the dtype of
    the weights; if there are several dtypes, the dtype of the first floating-point tensor. tensors, parameters: the
    number of tensors and the number of parameter elements that were written. checkpoint: the folder of the checkpoint.
    step: the checkpoint's step. digest: the digest of the exported weights, before any cast. weights: "trained", or
    "ema" for the average of the weights. In both cases, the buffers are those of the checkpoint's step.
    """

    out: str
    files: list[str]
    weights_bytes: int
    dtype: str
    tensors: int
    parameters: int
    step: int
    digest: str
    checkpoint: str
    seconds: float
    weights: str = TRAINED

    @property
    def has_config(self) -> bool:
        """Return True if `AutoModel.from_pretrained(out)` finds all the files it needs."""
        return CONFIG in self.files


def export(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    weights: str = TRAINED,
    max_shard_size: int | str = "5GB",
    progress: ProgressCallback | None = None,
) -> ExportSummary:
    """Write the weights of a run's checkpoint to the folder `out`, as safetensors in Hugging Face's layout.

    run: a run directory, the folder or address that was passed to `Engine.save`, or a checkpoint. step: the step
    of the checkpoint (default: the last). dtype: "fp32" (the master weights, bit for bit) or "bf16"; default: the dtype
    in which the model was trained. Buffers retain their dtype. weights: "trained", or "ema" for the average of the
    weights, of any kind, together with the current buffers. max_shard_size: the largest size of a file; a larger
    tensor gets its own file. progress: called with the bytes of weights written so far, and the bytes of all weights.
    out: a new path, or an empty folder.

    `export` runs in one process. It needs memory for one piece of a parameter (some MiB) or one complete buffer, for
    the checkpoint's list of pieces, and 8 bytes per 1,024 elements for the digest. Optimizer state is not read. Raises
    ConfigError, and CheckpointError for missing or damaged files. After an error, nothing is left at `out`.
    """
    started = time.monotonic()
    target, max_bytes = Path(out), parse_size(max_shard_size)
    if dtype is not None and dtype not in PRECISIONS:
        raise ConfigError(
            "export has no such dtype",
            expected=" or ".join(PRECISIONS),
            got=repr(dtype),
            hint=nearest(dtype, PRECISIONS),
        )
    if weights not in (TRAINED, AVERAGED):
        raise ConfigError("there are no such weights", expected=f"{TRAINED!r} or {AVERAGED!r}", got=repr(weights))
    folder = find_checkpoint(location_of(run), step)
    _refuse_taken(target)
    saved = SavedWeights(folder, None if dtype is None else _PRECISION_DTYPES[dtype], averaged=weights == AVERAGED)
    with _published(target) as partial, _one_thread():
        shards = plan_shards(saved.entries, max_bytes)
        _write_shards(partial, shards, saved, progress)
        digest = saved.digest()
        for name, content in saved.manifest.config_files.items():
            _write_text(partial / name, config_text(content, dtype_name(saved.dtype)))
        if saved.extra_states:
            _write_text(partial / EXTRA_STATES, json.dumps(saved.extra_states, indent=2) + "\n")
        files = sorted(path.name for path in partial.iterdir())
    return ExportSummary(
        out=str(out),
        files=files,
        weights_bytes=saved.nbytes,
        dtype=dtype_name(saved.dtype),
        tensors=len(saved.entries),
        parameters=saved.num_parameters,
        step=saved.manifest.step,
        digest=digest,
        checkpoint=str(folder),
        weights=weights,
        seconds=time.monotonic() - started,
    )


def find_checkpoint(run: Location, step: int | None) -> Location:
    """Return the run's checkpoint of that step or, if `step` is None, its last checkpoint.

    Raises ConfigError and CheckpointError.
    """
    is_run = isinstance(run, Path) and (run / "checkpoints").is_dir()
    place = checkpoints_of(run) if isinstance(run, Path) and is_run else run
    error = refusal(place, run_in(run)) if isinstance(run, Path) and is_run else None
    if error is not None:
        raise error
    found = list_checkpoints(place)
    if not found and not is_run and (run / MANIFEST).is_file():
        found = [(read_manifest(run).step, run)]
    if not found:
        raise ConfigError(
            "there is no checkpoint here",
            where=str(run.absolute()),
            expected="a run directory, a folder of checkpoints, or a checkpoint",
            got="no complete checkpoint" if run.exists() else "nothing",
            hint="check the path; a run writes a checkpoint when it ends or is stopped, "
            "and every N steps with --checkpoint-every N",
        )
    if step is None:
        return found[-1][1]
    for number, folder in found:
        if number == step:
            return folder
    steps = ", ".join(str(number) for number, _ in found)
    raise ConfigError(f"the run has no checkpoint of step {step}", where=str(run.absolute()), expected=steps, got=step)


def parse_size(size: int | str) -> int:
    """Convert 5_000_000_000, "5GB" (powers of 1000) or "5GiB" (powers of 1024) to bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(f"{size}B" if str(size).strip().isdigit() else str(size))
    number = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()])
    if number < 1:
        raise ConfigError("max_shard_size can't be parsed", expected='a size such as "5GB" or "500MiB"', got=repr(size))
    return number


def plan_shards(entries: list[TensorEntry], max_bytes: int) -> dict[str, list[TensorEntry]]:
    """Divide the tensors, in order, among files of up to `max_bytes` (or one larger tensor): file name -> tensors."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return dict(zip(names if len(names) > 1 else [SINGLE], shards, strict=True))


def _write_shards(
    folder: Path, shards: dict[str, list[TensorEntry]], weights: SavedWeights, progress: ProgressCallback | None
) -> None:
    written = 0
    for name, entries in shards.items():
        ordered = in_file_order(entries)
        with TensorFileWriter(folder / name, ordered, {"format": "pt"}) as file:
            for entry in ordered:
                for part in weights.parts(entry):
                    written += file.write(part)
                    if progress is not None:
                        progress(written, weights.nbytes)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": weights.num_parameters, "total_size": weights.nbytes},
            "weight_map": {entry.name: name for name, entries in shards.items() for entry in entries},
        }
        _write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _refuse_taken(out: Path) -> None:
    if out.is_symlink() or out.exists():
        entries = sorted(path.name for path in out.iterdir()) if out.is_dir() else None
        if entries != []:
            raise ConfigError(
                "the export's destination is not empty",
                where=str(out.absolute()),
                expected="a new path, or an empty folder",
                got="a file" if entries is None else f"a folder with {', '.join(entries[:5])}",
                hint="choose another path; nothing was written",
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, because the operations on a piece are so short that several threads would only wait for each
    other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `out`.

    If the block ends without an error, the folder is renamed to `out`. Otherwise, it is deleted.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # an export that was killed may have left it
        partial.mkdir(parents=True)
        yield partial
        publish_folder(partial, out, None, replace=False)
    except OSError as error:
        raise CheckpointError(
            f"the export can't be written: {error.strerror or error}",
            where=str(error.filename or partial),
            hint="choose a folder that you may write to, on a disk with enough free space",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
