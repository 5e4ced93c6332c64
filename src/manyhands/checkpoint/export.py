"""Exports weights in Hugging Face's layout, as a stream.

    OUT/
        config.json                          the model's config, if it is a transformers model
        generation_config.json               the model's generation config, under the same condition
        model-00001-of-00002.safetensors     the weights; only model.safetensors if one file is enough
        model.safetensors.index.json         the file of each tensor
        extra_state.json                     the extra states of modules that are not tensors

or, for an adapter of peft that isn't merged:

    OUT/
        adapter_config.json                  the adapter's config
        adapter_model.safetensors            the adapter's tensors

Each piece is read from the checkpoint, checked, cast and written before the next one is read. The folder is written
under a hidden name. It gets its final name when it is complete and the digest of its weights equals the checkpoint's
digest.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from manyhands.checkpoint.exported import Exported, Form, exported_form
from manyhands.checkpoint.find import find_checkpoint
from manyhands.checkpoint.saved_weights import SavedWeights, precision_dtype
from manyhands.checkpoint.weight_files import CONFIG, INDEX, SINGLE
from manyhands.errors import CheckpointError, ConfigError
from manyhands.storage.atomic import publish_folder, sync
from manyhands.storage.location import location_of
from manyhands.storage.tensor_file import TensorEntry, TensorFileWriter, dtype_name, in_file_order
from manyhands.validation import AVERAGED, TRAINED

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
    step: the checkpoint's step. digest: the digest of the exported weights, before any cast. weights: as
    they were asked for, such as "trained", or "ema" for the average of the weights. The buffers are always those of the
    checkpoint's step. form: "model", "adapter" for the adapter of a peft model, or "merged" for its base model with the
    adapter merged into it.
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
    form: Form = "model"

    @property
    def has_config(self) -> bool:
        """Return True if `AutoModel.from_pretrained(out)` finds all the files it needs."""
        return CONFIG in self.files


def export(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    weights: str = TRAINED,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    merge: bool = False,
    progress: ProgressCallback | None = None,
) -> ExportSummary:
    """Write the weights of a run's checkpoint to the folder `out`, as safetensors in Hugging Face's layout.

    Of a peft model, the adapter alone is written, in a folder that `PeftModel.from_pretrained(base, out)` loads.

    run: a run directory, the folder or address that was passed to `Engine.save`, or a checkpoint. step: the step of the
    checkpoint (default: the last). weights: "trained"; "ema" for the average of the weights, whatever its kind,
    together with the current buffers; or "best", for the checkpoint that `keep_best` kept, and
    "best:validation.loss:min" if the run has kept several. dtype: "fp32" (the master weights, bit for bit) or "bf16";
    default: the dtype in which the model was trained. Buffers retain their dtype. max_shard_size: the largest size of a
    file; a larger tensor gets its own file. An adapter is always one file. merge: write the base model of a peft model
    with the LoRA adapter added to its weights, for loaders without peft. The sums are computed in fp32, then cast.
    progress: called with the bytes of weights written so far, and the bytes of all weights. out: a new path, or an
    empty folder.

    `export` is not collective: it runs in one process, so a script with several workers calls it on one of them.
    It needs memory for one piece of a parameter (some MiB) or one complete buffer, for the checkpoint's list of pieces,
    and 8 bytes per 1,024 elements for the digest. Optimizer state is not read. Raises ConfigError, also if `merge` is
    given and there is no LoRA adapter, and CheckpointError for missing or damaged files. After an error, nothing is
    left at `out`.
    """
    started = time.monotonic()
    target, max_bytes = Path(out), parse_size(max_shard_size)
    cast = precision_dtype(dtype)
    folder = find_checkpoint(location_of(run), step, weights)
    _refuse_taken(target)
    saved = SavedWeights(folder, cast, averaged=weights == AVERAGED)
    if saved.manifest.computed:
        raise CheckpointError(
            f"the model's state_dict has tensors that are not parameters or buffers of the model: "
            f"{', '.join(saved.manifest.computed[:5])}",
            where=str(folder),
            hint="a hook or an overridden state_dict() adds them, and checkpoints don't contain them",
        )
    exported = exported_form(saved, merge=merge)
    with _published(target) as partial, _one_thread():
        shards = (
            plan_shards(exported.entries, max_bytes) if exported.file is None else {exported.file: exported.entries}
        )
        _write_shards(partial, shards, exported, progress)
        digest = saved.digest()
        for name, text in exported.config_files().items():
            _write_text(partial / name, text)
        if saved.extra_states and exported.form == "model":
            _write_text(partial / EXTRA_STATES, json.dumps(saved.extra_states, indent=2) + "\n")
        files = sorted(path.name for path in partial.iterdir())
    return ExportSummary(
        out=str(out),
        files=files,
        weights_bytes=exported.nbytes,
        dtype=dtype_name(exported.dtype),
        tensors=len(exported.entries),
        parameters=exported.num_parameters,
        step=saved.manifest.step,
        digest=digest,
        checkpoint=str(folder),
        weights=weights,
        form=exported.form,
        seconds=time.monotonic() - started,
    )


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
    folder: Path, shards: dict[str, list[TensorEntry]], weights: Exported, progress: ProgressCallback | None
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
                hint="choose another path; nothing was written. In a script with several workers, export on one worker",
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
    """Yield a hidden folder next to `out`, which no other process uses.

    If the block ends without an error, the folder is renamed to `out`. Otherwise, it is deleted.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _owned(partial, out):
            try:
                yield partial
                publish_folder(partial, out, None, replace=False)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the export can't be written: {error.strerror or error}",
            where=str(error.filename or partial),
            hint="choose a folder that you may write to, on a disk with enough free space",
        ) from error


@contextmanager
def _owned(folder: Path, out: Path) -> Iterator[None]:
    """Create `folder`, or empty it if an export that was killed has left it, and lock it for the duration of the block.

    Raises ConfigError if another process is exporting to `out`, such as another worker of the same script.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        is_free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError:  # the file system has no locks
            pass
        if not (is_free and folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())):
            raise ConfigError(
                "another process is exporting to the same folder",
                where=str(out),
                hint="if a script with several workers exports, export on one of them: "
                'if os.environ.get("RANK", "0") == "0"',
            )
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    finally:
        os.close(handle)
