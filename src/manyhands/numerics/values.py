"""Texts for the plain values inside objects, for comparing objects over time and between workers.

Plain values are numbers, text, dates, tensors, arrays, the states of random generators and the positions of iterators.
They may be in lists, tuples, sets, deques, dicts and the attributes and slots of objects. A function is represented by
its name. What a function holds, Python modules, classes, and other objects without attributes are left out.
"""

from __future__ import annotations

import hashlib
import random
import re
import types
import warnings
from collections import OrderedDict, deque
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

_SCALARS = frozenset((type(None), bool, int, float, complex))

_DICTS = frozenset((dict, OrderedDict))

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)

_OPAQUE = (type, *_FUNCTIONS, types.ModuleType, types.CodeType)

_WITH_FULL_TEXT = frozenset(("array", "datetime", "decimal", "fractions", "uuid"))
"""Python modules with types whose `repr` has the complete value."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""The address in an object's text, which differs between processes."""

Attributes = Callable[[object], Mapping[str, Any] | None]


def attributes_of(value: object) -> Mapping[str, Any] | None:
    """Return the attributes and slots of an object, or None if they are not a part of its value."""
    if isinstance(value, _OPAQUE):
        return None
    attributes: Mapping[str, Any] | None = getattr(value, "__dict__", None)
    names = slots_of(type(value))
    if not names:
        return attributes
    return {name: getattr(value, name) for name in names if hasattr(value, name)} | dict(attributes or {})


def slots_of(kind: type) -> list[str]:
    """Return the names of the slots of a class that is written in Python."""
    descriptors = (vars(base).items() for base in kind.__mro__ if "__slots__" in vars(base))
    return [
        name
        for found in descriptors
        for name, each in found
        if isinstance(each, types.MemberDescriptorType) and name not in ("__dict__", "__weakref__")
    ]


def no_attributes(_: object) -> None:
    """Return None for every object: pass this function instead of `attributes_of` to leave out all attributes."""


def plain_values(
    name: str, value: object, attributes: Attributes = attributes_of, known: Container[int] = ()
) -> dict[str, str]:
    """Return a text for each plain value inside `value`, by a name such as `name.layers[3].scale`.

    Two texts are equal if and only if the values are equal bit for bit. attributes: a function that returns the
    attributes of an object that are a part of its value. known: the ids of objects to leave out.
    """
    # Most attributes of modules are of these kinds, and an evaluation reads all of them.
    if is_scalar(value):
        return {name: repr(value)}
    if is_empty_dict(value):
        return {name: f"empty {type(value).__name__}"}
    return dict(_leaves(name, value, attributes, known, frozenset()))


def is_scalar(value: object) -> bool:
    """Return True for None and for a number of Python's own types."""
    return type(value) in _SCALARS


def is_empty_dict(value: object) -> bool:
    """Return True for an empty dict of Python's own types."""
    return type(value) in _DICTS and not value


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
        return [(f"[{_ADDRESS.sub('', repr(key))}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        if sum(1 for _ in value) > 16 and all(isinstance(item, (*_NUMBERS, str)) for item in value):
            return [("", f"{len(value)} values, {_hashed(repr(list(value)).encode())}")]
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        # The order of a set, and the addresses of objects, differ between processes.
        return [("", repr(sorted(_ADDRESS.sub("", repr(item)) for item in value)))]
    if isinstance(value, Iterator):
        return _position_of(value)
    return [(f".{name}", item) for name, item in (attributes(value) or {}).items()]


def _position_of(iterator: Iterator[Any]) -> Iterable[tuple[str, object]]:
    """Return what an iterator of Python's own has yet to yield, or the position of a running generator function."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        if frame is None:
            return [("", "a generator that has ended")]
        return [(".position", frame.f_lasti), *((f".{name}", item) for name, item in frame.f_locals.items())]
    if type(iterator).__module__ not in ("builtins", "itertools"):
        return [(f".{name}", item) for name, item in (attributes_of(iterator) or {}).items()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, for iterators of itertools
            return [(".position", iterator.__reduce__()[1:])]  # without the iterator's function
    except TypeError:  # it can't be copied
        return [(".position", _ADDRESS.sub("", repr(iterator)))]


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
    if isinstance(value, _NUMBERS) or type(value).__module__ in _WITH_FULL_TEXT:
        return repr(value)
    if isinstance(value, _FUNCTIONS):
        return f"the function {value.__module__}.{value.__qualname__}"
    generator = generator_of(value)
    return None if generator is None else f"a random generator in state {_hashed(_as_bytes(generator.get()))}"


def _tensor_text(tensor: Tensor) -> str:
    shape = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
    parts = _parts_of(tensor)
    if parts is not None:
        return ", ".join([f"{shape} ({tensor.layout})", *map(_tensor_text, parts)])
    if tensor.numel() == 1 and tensor.dtype.itemsize != 1:
        return f"{shape}, value {tensor.item()!r}"
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return f"{shape}, {_hashed(flat.view(torch.uint8).numpy().data if flat.numel() else b'')}"


def _parts_of(tensor: Tensor) -> list[Tensor] | None:
    """Return the dense tensors inside a sparse, quantized or meta tensor, or None for a tensor that is dense itself."""
    own = tensor.detach()
    if own.is_meta:
        return []
    if own.is_quantized:
        return [own.int_repr()]
    if own.layout == torch.sparse_coo:
        return [own._indices(), own._values()]
    if own.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [own.crow_indices(), own.col_indices(), own.values()]
    if own.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [own.ccol_indices(), own.row_indices(), own.values()]
    return None if own.layout == torch.strided else []


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
