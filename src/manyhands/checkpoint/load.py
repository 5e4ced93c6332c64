"""Load a checkpoint into an engine of any number of workers and any stage: each reads only the ranges that it holds."""

from __future__ import annotations

import zlib
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manyhands.checkpoint.format import Manifest, PieceRecord, decode_state, read_manifest
from manyhands.engine.engine import StepEngine
from manyhands.errors import CheckpointError, NumericsError
from manyhands.numerics.identity import numerics_identity


class CheckpointReader:
    """Reads ranges of named tensors out of a checkpoint's files, whatever pieces they were written in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._pieces: dict[tuple[str, str], list[PieceRecord]] = defaultdict(list)
        for piece in self.manifest.pieces:
            self._pieces[piece.kind, piece.name].append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)
        self._checked: set[tuple[str, str]] = set()

    def kinds_of(self, name: str) -> list[str]:
        """Which tensors there are of a parameter."""
        return [kind for kind, other in self._pieces if other == name]

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel), 1-D. Raises CheckpointError."""
        parts, position = [], start
        for piece in self._pieces.get((kind, name), []):
            first, last = max(position, piece.start), min(start + numel, piece.start + piece.numel)
            if first == position and first < last:
                parts.append(self._read_piece(piece, first - piece.start, last - piece.start))
                position = last
        if position != start + numel:
            raise CheckpointError(
                f"the checkpoint lacks elements of {kind} of {name!r}",
                where=str(self.folder),
                expected=f"[{start}, {start + numel})",
                got=f"[{start}, {position})",
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0].clone()

    def _read_piece(self, piece: PieceRecord, start: int, end: int) -> Tensor:
        """Elements [start, end) of the piece; the whole of it is read, and checked, the first time."""
        path = self.folder / piece.file
        checked = (piece.file, piece.key) in self._checked
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_slice(piece.key)[start:end] if checked else file.get_tensor(piece.key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "a file of the checkpoint is missing or broken",
                where=str(path),
                got=error,
                hint="go back to an earlier checkpoint",
            ) from error
        if not checked:
            found = zlib.crc32(tensor.numpy().data.cast("B")) if tensor.numel() else zlib.crc32(b"")
            if tensor.numel() != piece.numel or found != piece.crc32:
                raise CheckpointError(
                    f"the checkpoint's {piece.key!r} is damaged",
                    where=str(path),
                    expected=f"{piece.numel} elements with checksum {piece.crc32:08x}",
                    got=f"{tensor.numel()} elements with checksum {found:08x}",
                    hint="go back to an earlier checkpoint",
                )
            self._checked.add((piece.file, piece.key))
            tensor = tensor[start:end]
        return tensor

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers."""
        found = {}
        for (kind, name), pieces in self._pieces.items():
            if kind == "buffer":
                found[name] = self._read_piece(pieces[0], 0, pieces[0].numel).view(pieces[0].shape or [])
        return found


def load_checkpoint(engine: StepEngine, folder: Path, *, accept_new_numerics: bool = False) -> Manifest:
    """Make the engine's state that of the checkpoint in `folder`. Collective.

    Raises CheckpointError (missing, damaged, of another recipe) and NumericsError (saved under another numerics
    identity, unless accepted: then later bits may differ from the saving run's).
    """
    reader = CheckpointReader(folder)
    manifest = reader.manifest
    _check_facts(manifest, engine, folder)
    if not accept_new_numerics:
        check_identity(
            manifest.identity, numerics_identity(engine.group.device, engine.recipe.threads_per_worker), str(folder)
        )
    for piece, _ in engine.updater.slices:
        numel = piece.master.numel()
        piece.master.copy_(reader.read("master", piece.name, piece.start, numel))
        state: dict[str, Tensor | float | int | bool] = {
            kind: reader.read(kind, piece.name, piece.start, numel).to(engine.group.device)
            for kind in reader.kinds_of(piece.name)
            if kind != "master"
        }
        for kind, number in manifest.scalars.get(piece.name, {}).items():
            # torch's optimizers change their step counts and the like in place, where these are tensors.
            dtype = number.dtype
            state[kind] = (
                number.value
                if dtype is None
                else torch.tensor(number.value, dtype=getattr(torch, dtype), device=number.device)
            )
        engine.optimizer.load_state_of(piece, state)  # empty before a parameter's first update, also if it had one here
    buffers = engine.buffers.named()
    for name, value in reader.buffers().items():
        if name in buffers:
            saved = value.view(torch.bfloat16) if buffers[name].dtype == torch.bfloat16 else value
            buffers[name].copy_(saved)
    engine.updater.refresh_params()
    engine.optimizer.load_hyperparameters(manifest.hyperparameters)
    if engine.schedule is not None and manifest.schedule is not None:
        engine.schedule.load_state_dict(decode_state(manifest.schedule))
    engine.step_index = manifest.step
    found = engine.digest()
    if found != manifest.digest:
        raise CheckpointError(
            "the loaded weights are not those that were saved", where=str(folder), expected=manifest.digest, got=found
        )
    return manifest


def _check_facts(manifest: Manifest, engine: StepEngine, folder: Path) -> None:
    facts = engine.facts()
    for name in [*facts, *manifest.facts]:
        saved, now = manifest.facts.get(name, "nothing"), facts.get(name, "nothing")
        if saved != now:
            raise CheckpointError(
                f"the checkpoint is of another recipe: {name} differs",
                where=str(folder),
                expected=f"{saved} (saved)",
                got=f"{now} (this recipe)",
                hint="use the recipe it was saved with, or begin a new run directory",
            )


def check_identity(saved: dict[str, str], now: dict[str, str], where: str) -> None:
    """Raises NumericsError if the two differ."""
    for name in [*saved, *now]:
        if saved.get(name) != now.get(name):
            raise NumericsError(
                f"the run was begun under other numerics: {name} differs, so its bits can't be continued here",
                where=where,
                expected=f"{saved.get(name)} (saved)",
                got=f"{now.get(name)} (here)",
                hint="go on elsewhere, or say --accept-new-numerics (accept_new_numerics=True)",
            )
