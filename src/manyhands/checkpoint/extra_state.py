"""The extra state of modules (`get_extra_state`) in checkpoints: plain values and tensors, never pickled objects.

The manifest holds plain values as JSON: None, bool, int, str, float and lists as they are; anything else as a dict
whose first key names its type. Tensors and arrays are pieces of the kind "extra", and the manifest has their names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from manyhands.checkpoint.pieces import PieceReader, TensorPiece
from manyhands.comm.agreement import agree
from manyhands.comm.group import Group
from manyhands.errors import CheckpointError, ConfigError
from manyhands.storage.tensor_file import CODES, bytes_of, dtype_name, dtype_named

KIND = "extra"

_HINT = (
    "return tensors, NumPy arrays, numbers, strings, bytes, None, and lists, tuples and dicts of them; or keep the "
    "state in buffers of the module"
)


class ExtraStates(NamedTuple):
    """The extra states of a model.

    values: the encoded state of each module, by its name in the state_dict. tensors: the tensors in them, as pieces.
    """

    values: dict[str, Any]
    tensors: list[TensorPiece]


def extra_states(model: nn.Module) -> ExtraStates:
    """Return the extra states of the model's modules. Raises ConfigError for a state that a checkpoint can't hold."""
    states = ExtraStates({}, [])
    for key, module in modules_with_state(model):
        try:
            value = module.get_extra_state()
        except Exception as error:
            raise ConfigError(
                f"get_extra_state of {key!r} raised {type(error).__name__}: {error}",
                hint="it is called between two steps, when the parameters may be sharded",
            ) from error
        states.values[key] = _Encoder(key, states.tensors).encode(value)
    return states


def modules_with_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module that overrides `get_extra_state`, with the name of its state in the model's state_dict."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name}._extra_state".removeprefix("."), module


def check_extra_states(model: nn.Module, group: Group) -> None:
    """Check that the extra states can be saved and restored, and are the same on all workers. Collective.

    Raises ConfigError. Does nothing if the model has no extra states.
    """
    found = dict(modules_with_state(model))
    for key, module in found.items():
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise ConfigError(
                f"the state {key!r} could not be restored: its module has get_extra_state, but no set_extra_state",
                where=type(module).__qualname__,
                hint="define set_extra_state, too",
            )
    if not found:
        return
    values, tensors = extra_states(model)
    agree(
        group,
        "extra state",
        {key: _fingerprint(value, [each for each in tensors if _owner(each) == key]) for key, value in values.items()},
        hint="get_extra_state must not depend on which micro-batches a worker has computed; keep such state in buffers",
    )


def _fingerprint(value: Any, tensors: list[TensorPiece]) -> str:
    found = hashlib.sha256(json.dumps(value).encode())
    for piece in tensors:
        found.update(bytes_of(piece.tensor.detach().cpu().contiguous()))
    return found.hexdigest()[:16]


def _owner(piece: TensorPiece) -> str:
    return piece.name.rpartition("|")[0]


def load_extra_states(model: nn.Module, values: dict[str, Any], reader: PieceReader) -> None:
    """Restore the saved extra states. Raises CheckpointError if they don't match the model's modules."""
    modules = dict(modules_with_state(model))
    if modules.keys() != values.keys():
        raise CheckpointError(
            "the checkpoint's extra states are not those of the model's modules",
            where=str(reader.folder),
            expected=", ".join(modules) or "none",
            got=", ".join(values) or "none",
            hint="use the model with which the checkpoint was saved. Checkpoints of earlier versions contain no extra "
            "states",
        )
    for key, module in modules.items():
        try:
            module.set_extra_state(decode(values[key], lambda name: _read(name, reader)))
        except CheckpointError:
            raise
        except Exception as error:  # raised by the user's module, or caused by a changed manifest
            raise CheckpointError(
                f"the extra state {key!r} can't be restored: {type(error).__name__}: {error}",
                where=str(reader.folder),
                got=str(values[key])[:80],
                hint="use the model that it was saved with, or go back to an earlier checkpoint",
            ) from error


def exported(values: dict[str, Any], reader: PieceReader) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the tensors among the saved extra states (key -> name of the piece), and the other states as JSON."""
    tensors = {
        key: str(value["tensor"]) for key, value in values.items() if isinstance(value, dict) and "tensor" in value
    }
    others = {key: decode(value, lambda name: _read(name, reader)) for key, value in values.items()}
    return tensors, {key: _as_json(value) for key, value in others.items() if key not in tensors}


def _as_json(value: Any) -> Any:
    """Return JSON values for people to read: types are lost, and infinity and NaN become text."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, dict):
        return [[_as_json(key), _as_json(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, (Tensor, np.ndarray)):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": _as_json(value.tolist())}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    is_plain = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if value is None or is_plain else str(value)


def _read(name: str, reader: PieceReader) -> Tensor:
    found = reader.read_full(KIND, name)
    if found is None:
        raise CheckpointError(
            f"the checkpoint lacks some elements of {name!r} ({KIND})",
            where=str(reader.folder),
            hint="go back to an earlier checkpoint",
        )
    return found


class _Encoder:
    """Encodes the extra state `key` as JSON values; appends its tensors to `tensors`."""

    def __init__(self, key: str, tensors: list[TensorPiece]) -> None:
        self._key, self._tensors = key, tensors
        self._number = 0

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind is list:
            return [self.encode(item) for item in value]
        if kind is tuple:
            return {"tuple": [self.encode(item) for item in value]}
        if kind in (dict, OrderedDict):
            return {kind.__name__: [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if kind is float:
            return {"float": repr(value)}
        if kind is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if kind is torch.dtype:
            return {"dtype": dtype_name(value)}
        if kind is np.ndarray and value.dtype != object:
            return {"array": self._piece(torch.from_numpy(np.array(value)))}
        if kind in (Tensor, nn.Parameter, nn.Buffer) and value.layout is torch.strided and value.dtype in CODES:
            return {"tensor": self._piece(value.detach()), "device": value.device.type}
        raise ConfigError(
            f"the extra state of a module has a type that a checkpoint can't hold: {kind.__qualname__}",
            where=f"{self._key!r} of the model's state_dict",
            got=repr(value)[:80],
            hint=_HINT,
        )

    def _piece(self, tensor: Tensor) -> str:
        name = f"{self._key}|{self._number}"
        self._number += 1
        self._tensors.append(TensorPiece(KIND, name, 0, tensor.reshape(-1), tuple(tensor.shape)))
        return name


def decode(value: Any, read: Callable[[str], Tensor]) -> Any:
    """Return the value that was encoded. read: returns the tensor with the given name."""
    if isinstance(value, list):
        return [decode(item, read) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tuple":
        return tuple(decode(item, read) for item in content)
    if kind in ("dict", "OrderedDict"):
        pairs = ((decode(key, read), decode(item, read)) for key, item in content)
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dtype":
        return dtype_named(content)
    tensor = read(content)
    return tensor.numpy() if kind == "array" else tensor.to(value["device"])
