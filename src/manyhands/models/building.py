"""Builds the model with its initial weights, in files if it does not fit in memory.

Build a model that doesn't fit: what its constructor makes lies in files from the start, or is never written.
The constructor runs as it is, so the initial weights have the bits that they have in memory; the kernel keeps as much
of them in memory as there is room for. Where all weights come from elsewhere they needn't be initialised: memory that
nobody writes to takes none.

Builds a recipe's model with its initial weights; without them, where files have them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manyhands.config import Recipe
from manyhands.errors import ConfigError
from manyhands.models.admission import admit
from manyhands.numerics.counters import derive
from manyhands.numerics.seeds import preserved_generators, seed_generators
from manyhands.offload.allocator import Allocator

LARGE_BYTES = 1 << 18
"""Smaller tensors stay where they are: mapping one costs pages of its own."""

UNWRITTEN_BYTES = 1 << 22
"""Smaller parameters are initialised also if their values will come from elsewhere: not all of them may (adapters)."""

RECENT = 2
"""So many of the last ones stay in memory: modules fill a tensor soon after they made it."""

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class BuiltAt(TorchFunctionMode):
    """`with BuiltAt(home):` large tensors that torch's factories make on the CPU are buffers of `home`."""

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self._allocator = allocator
        self._recent: deque[Tensor] = deque()  # what the constructor may still be filling

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.clone:  # what copy.deepcopy makes a parameter with: layers may be copies of one
            return self._copy(*args, **kwargs)
        plain = "out" not in kwargs and "memory_format" not in kwargs and kwargs.get("layout") in (None, torch.strided)
        if func not in _FACTORIES or not plain:
            return func(*args, **kwargs)
        size = kwargs.get("size", args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        if device.type != "cpu" or math.prod(size) * dtype.itemsize < LARGE_BYTES:
            return func(*args, **kwargs)
        place = self._place(tuple(size), dtype)
        if func is not torch.empty:
            drawn_from = {key: value for key, value in kwargs.items() if key == "generator"}
            func(size, out=place, **drawn_from)
        return place.requires_grad_() if kwargs.get("requires_grad") else place

    def _copy(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        large = tensor.device.type == "cpu" and tensor.nbytes >= LARGE_BYTES
        if not large or not tensor.is_contiguous() or tensor.requires_grad:
            return tensor.clone(**kwargs)
        return self._place(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def _place(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        while len(self._recent) >= RECENT:
            self._allocator.evict(self._recent.popleft())
        place = self._allocator.empty(math.prod(size), dtype).view(size)
        self._recent.append(place.detach())
        return place


_WRITES = frozenset(name for name in dir(nn.init) if name.endswith("_") and name[0] != "_") | frozenset(
    ("add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
)
"""Functions that initialise (libraries put others of the same names in their place), and the tensors' methods that they
are made of; others are left to write."""


class Unwritten(TorchFunctionMode):
    """`with Unwritten():` large parameters aren't initialised, since their values will come from elsewhere.

    Everything else is as it would be: shapes, types, other tensors, small parameters; though these are drawn from
    generators that nothing was drawn from for the large ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self._data: list[Tensor] = []  # what `.data` gave of large parameters

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in _WRITES:
            if is_unwritten(target) or any(target is data for data in self._data):
                return target
        elif func == _GET_DATA and is_unwritten(target):
            self._data.append(func(*args, **kwargs))
            return self._data[-1]
        return func(*args, **kwargs)


def is_unwritten(target: object) -> bool:
    """Whether it's a parameter of the size that `Unwritten` leaves as it is."""
    return isinstance(target, nn.Parameter) and target.nbytes >= UNWRITTEN_BYTES


_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def evict_model(tensors: Iterable[Tensor], allocator: Allocator) -> None:
    """None of those that are at `home` is wanted for a while."""
    for tensor in tensors:
        if allocator.owns(tensor):
            allocator.evict(tensor)


def build_model(recipe: Recipe, allocator: Allocator) -> tuple[nn.Module, frozenset[str]]:
    """The recipe's model with its initial weights, a function of the recipe and its seed alone; and the names of the
    parameters whose values are still to come, from the recipe's files. Raises ConfigError.

    home: of what is built, until it's laid out; if it's apart, the whole model is never in memory. Nor are large
    parameters whose values are to come.
    """
    weights = recipe.initial_weights
    if weights is None:
        return _build(recipe, allocator), frozenset()
    with Unwritten():
        model = _build(recipe, allocator)
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    kept = {param for param in names if weights.may_lack(names[param])}
    awaited = frozenset(names[param][0] for param in names.keys() - kept)
    if any(map(is_unwritten, kept)):  # it has the value that it would have without files: all is drawn before it
        model = _build(recipe, allocator)
    return model, awaited


def _build(recipe: Recipe, allocator: Allocator) -> nn.Module:
    with preserved_generators(), BuiltAt(allocator) if allocator.on_disk else nullcontext():
        seed_generators(derive(recipe.seed, "init"))
        model = recipe.model()
    if not isinstance(model, nn.Module):
        raise ConfigError("recipe.model did not return a model", expected="a torch.nn.Module", got=repr(model))
    admit(model)
    return model
