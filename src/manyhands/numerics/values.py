"""Texts for the plain values inside objects, for comparing objects over time and between workers.

Plain values are numbers, text, tensors, arrays and the states of random generators. They may be in lists, tuples, sets,
deques, dicts and the attributes of objects. Functions, Python modules and objects without attributes are left out.
"""

from __future__ import annotations

import hashlib
import random
import types
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SHOWN = 60
"""The maximum length of a text that is shown in full. A longer text is shown by its start and its hash."""

MAX_LEAVES = 1000
"""The maximum number of plain values in a container. A container with more values is represented by one hash."""

_NUMBERS = (type(None), bool, int, float, complex, torch.dtype, torch.device, np.generic)

_OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, types.CodeType)

Attributes = Callable[[object], Mapping[str, Any] | None]


def attributes_of(value: object) -> Mapping[str, Any] | None:
    """Return the attributes of an object, or None if they are not a part of its value."""
    return None if isinstance(value, _OPAQUE) else getattr(value, "__dict__", None)


def no_attributes(_: object) -> None:
    """Leave out the attributes of all objects, for use instead of `attributes_of`."""


def plain_values(
    name: str, value: object, attributes: Attributes = attributes_of, known: Container[int] = ()
) -> dict[str, str]:
    """Return a text for each plain value inside `value`, by a name such as `name.layers[3].scale`.

    Two texts are equal if and only if the values are equal bit for bit. attributes: a function that returns the
    attributes of an object that are a part of its value. known: the ids of objects to leave out.
    """
    return dict(_leaves(name, value, attributes, known, frozenset()))


def _leaves(
    name: str, value: object, attributes: Attributes, known: Container[int], above: frozenset[int]
) -> Iterator[tuple[str, str]]:
    if id(value) in known and not isinstance(value, _NUMBERS):
        return
    text = _text(value)
    if text is not None:
        yield name, text
        return
    if id(value) in above:  # the object contains itself
        return
    above = above | {id(value)}
    found: list[tuple[str, str]] = []
    for label, item in _items(value, attributes):
        found += _leaves(name + label, item, attributes, known, above)
    if len(found) > MAX_LEAVES:
        yield name, f"{len(found)} values, {_hashed(repr(found).encode())}"
    elif not found and isinstance(value, Collection):
        yield name, f"empty {type(value).__name__}"
    yield from found if len(found) <= MAX_LEAVES else ()


def _items(value: object, attributes: Attributes) -> Iterable[tuple[str, object]]:
    """Return the parts of a container or object. Each has the suffix that its name adds to the container's name."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        if sum(1 for _ in value) > 16 and all(isinstance(item, (*_NUMBERS, str)) for item in value):
            return [("", f"{len(value)} values, {_hashed(repr(list(value)).encode())}")]
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [("", repr(sorted(map(repr, value))))]  # the order of a set differs between processes
    return [(f".{name}", item) for name, item in (attributes(value) or {}).items()]


def _text(value: object) -> str | None:
    """Return the text of a plain value, or None for any other object."""
    if isinstance(value, Tensor):
        return _tensor_text(value)
    if isinstance(value, np.ndarray):
        raw = repr(value.tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
        return f"{value.dtype} array of shape {value.shape}, {_hashed(raw)}"
    if isinstance(value, (str, bytes, bytearray)):
        text = repr(value)
        return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}..., {_hashed(text.encode())}"
    if isinstance(value, _NUMBERS):
        return repr(value)
    generator = generator_of(value)
    return None if generator is None else f"a random generator in state {_hashed(_as_bytes(generator.get()))}"


def _tensor_text(tensor: Tensor) -> str:
    shape = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"{shape} ({tensor.layout})"
    if tensor.numel() == 1 and tensor.dtype.itemsize != 1:
        return f"{shape}, value {tensor.item()!r}"
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return f"{shape}, {_hashed(flat.view(torch.uint8).numpy().data if flat.numel() else b'')}"


class Generator(NamedTuple):
    """Functions that get and set the state of a random generator."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]


def generator_of(value: object) -> Generator | None:
    """Return the functions of a random generator of Python, numpy or torch, or None for any other object."""
    if isinstance(value, torch.Generator):
        return Generator(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return Generator(value.getstate, value.setstate)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return Generator(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(value, np.random.RandomState):
        return Generator(lambda: value.get_state(legacy=False), value.set_state)
    return None


def _as_bytes(state: Any) -> bytes:
    return state.numpy().tobytes() if isinstance(state, Tensor) else repr(state).encode()


def _hashed(raw: Any) -> str:
    return "bits " + hashlib.blake2b(raw, digest_size=8).hexdigest()
