"""The weights of a run in a plain torch module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from manyhands.checkpoint.extra_state import load_extra_states
from manyhands.checkpoint.find import find_checkpoint
from manyhands.checkpoint.format import TensorRecord
from manyhands.checkpoint.saved_weights import SavedWeights, precision_dtype, stored_dtype
from manyhands.config import Recipe
from manyhands.errors import ConfigError
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import preserved_generators, seed_generators
from manyhands.storage.location import location_of
from manyhands.validation import AVERAGED, TRAINED

LISTED = 8
"""An error lists at most this many tensors."""


def load_model(
    run: str | Path,
    model: Recipe | Callable[[], nn.Module] | nn.Module,
    *,
    step: int | None = None,
    weights: str = TRAINED,
    dtype: str | None = None,
) -> nn.Module:
    """Return a torch module with the weights and buffers of a run's checkpoint, in evaluation mode.

    run: a run directory, a folder or address of checkpoints, or a checkpoint. model: the run's recipe, a function that
    builds the model, or a module, which is filled and returned. A run directory names no code, so loading one from an
    untrusted source executes nothing. step: the step of the checkpoint (default: the last). weights: "trained"; "ema"
    for the average of the weights; or "best", for the checkpoint that `keep_best` kept, and "best:validation.loss:min"
    if the
    run has kept several. dtype: "fp32" (the master weights, bit for bit) or "bf16"; default: the dtype in which the
    model was trained. Buffers retain their
    dtype. Tensors stay on the model's device.

    `load_model` is not collective: it reads the checkpoint in this process, piece by piece, and compares the weights
    with the checkpoint's digest. Optimizer state is not read. Raises ConfigError, also if the model is not the one that
    was trained, and CheckpointError for missing or damaged files. After a CheckpointError, a module that was passed may
    have some of the values.
    """
    cast = precision_dtype(dtype)
    saved = SavedWeights(find_checkpoint(location_of(run), step, weights), cast, averaged=weights == AVERAGED)
    built = _built(model)
    tensors: dict[str, Tensor] = dict([*built.named_parameters(), *built.named_buffers()])
    # A buffer that is not persistent may have been created in the run's first forward.
    records = [each for each in saved.manifest.tensors if each.is_parameter or each.keys or each.name in tensors]
    _refuse_other_model(built, tensors, records, saved)
    for record in records:
        _fill(tensors[record.name], record, saved, stored_dtype(record, cast))
    load_extra_states(built, saved.manifest.extra_states, saved.pieces)
    saved.digest()
    return built.eval()


def _built(model: Recipe | Callable[[], nn.Module] | nn.Module) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    build = model.model if isinstance(model, Recipe) else model
    if not callable(build):
        raise ConfigError(
            "load_model needs the model",
            expected="a manyhands.Recipe, a function that builds the model, or a torch.nn.Module",
            got=repr(model),
        )
    with preserved_generators():
        seed_generators(derive(model.seed if isinstance(model, Recipe) else 0, "init"))
        built = build()
    if not isinstance(built, nn.Module):
        raise ConfigError("the function did not return a model", expected="a torch.nn.Module", got=repr(built))
    return built


def _refuse_other_model(
    model: nn.Module, tensors: dict[str, Tensor], records: list[TensorRecord], saved: SavedWeights
) -> None:
    """Raise ConfigError unless the model has the tensors of the checkpoint, with their shapes, on a real device."""
    persistent = {id(value) for value in model.state_dict(keep_vars=True).values()}
    needed = {name for name, tensor in tensors.items() if id(tensor) in persistent}
    known = {record.name for record in records}
    problems = [f"{name}: not in the checkpoint" for name in sorted(needed - known)]
    for record in records:
        tensor = tensors.get(record.name)
        if tensor is None:
            problems.append(f"{record.name}: not in the model")
        elif tuple(tensor.shape) != record.shape:
            problems.append(f"{record.name}: expected {list(record.shape)}, got {list(tensor.shape)}")
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise ConfigError(
            "the model is not the one whose weights the checkpoint has",
            where=str(saved.folder),
            hint="pass the recipe of the run, or build the model with the same arguments",
            detail="\n".join(problems[:LISTED] + more),
        )
    on_meta = [record.name for record in records if tensors[record.name].is_meta]
    if on_meta:
        raise ConfigError(
            "the model has no memory for its weights",
            got=f"{on_meta[0]} is on the device meta",
            hint="call model.to_empty(device='cpu') first",
        )


@torch.no_grad()
def _fill(target: Tensor, record: TensorRecord, saved: SavedWeights, dtype: torch.dtype) -> None:
    """Fill a tensor of the model in place, or give it new memory if its dtype changes or its memory has gaps."""
    in_place = target.dtype == dtype and target.is_contiguous()
    values = target.detach() if in_place else torch.empty(record.shape, dtype=dtype, device=target.device)
    flat, first = values.view(-1), 0
    for part in saved.parts_of(record):
        flat[first : first + part.numel()].copy_(part)
        first += part.numel()
    if target.dtype != dtype:
        target.data = values
    elif not in_place:
        target.copy_(values)
