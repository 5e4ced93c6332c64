"""Builds the model with its initial weights, in files if it does not fit in memory.

With offload = "disk", the large tensors that the constructor creates are in files from the start. The constructor runs
unchanged, so the initial weights have the same bits as in memory. The kernel caches as much of these files as fits.

If weight files supply the values, large parameters are not initialised: memory that is never written takes no space.
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
"""Smaller tensors stay in memory, because a mapped tensor takes at least a page."""

UNWRITTEN_BYTES = 1 << 22
"""Smaller parameters are always initialised, because weight files may lack them, as for adapters."""

RECENT = 2
"""The number of recent tensors that stay in memory, because modules fill a tensor soon after they create it."""

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


class BuiltAt(TorchFunctionMode):
    """A context in which torch's factories create large CPU tensors as buffers of `allocator`."""

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self._allocator = allocator
        self._recent: deque[Tensor] = deque()  # the constructor may still be filling these

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.clone:  # copy.deepcopy clones parameters: layers may be copies of one layer
            return self._copy(*args, **kwargs)
        plain = "out" not in kwargs and "memory_format" not in kwargs and kwargs.get("layout") in (None, torch.strided)
        if func not in _FACTORIES or not plain:
            return func(*args, **kwargs)
        size = kwargs.get("size", args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args)
        # A dtype may be given as Python's bool, int or float.
        dtype = torch.empty(0, dtype=kwargs.get("dtype"), device="meta").dtype
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        if device.type != "cpu" or math.prod(size) * dtype.itemsize < LARGE_BYTES:
            return func(*args, **kwargs)
        buffer = self._allocate(tuple(size), dtype)
        if func is not torch.empty:
            generator = {key: value for key, value in kwargs.items() if key == "generator"}
            func(size, out=buffer, **generator)
        return buffer.requires_grad_() if kwargs.get("requires_grad") else buffer

    def _copy(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        large = tensor.device.type == "cpu" and tensor.nbytes >= LARGE_BYTES
        if not large or not tensor.is_contiguous() or tensor.requires_grad:
            return tensor.clone(**kwargs)
        return self._allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def _allocate(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        while len(self._recent) >= RECENT:
            self._allocator.evict(self._recent.popleft())
        buffer = self._allocator.empty(math.prod(size), dtype).view(size)
        self._recent.append(buffer.detach())
        return buffer


_WRITES = frozenset(name for name in dir(nn.init) if name.endswith("_") and name[0] != "_") | frozenset(
    ("add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
)
"""The names of functions that initialise tensors, and of the tensor methods that these functions call.

Names are used, because libraries replace the functions with others that have the same names. Functions not listed may
write to a tensor.
"""


class Unwritten(TorchFunctionMode):
    """A context in which large parameters are not initialised, because weight files supply their values.

    Other random values differ, because no random numbers are drawn for large parameters. Nothing else differs: shapes,
    types and other values are the same as without this context.
    """

    def __init__(self) -> None:
        super().__init__()
        self._data: list[Tensor] = []  # results of `.data` on large parameters

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
    """Return True if `target` is a parameter that `Unwritten` does not initialise."""
    return isinstance(target, nn.Parameter) and target.nbytes >= UNWRITTEN_BYTES


_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def evict_model(tensors: Iterable[Tensor], allocator: Allocator) -> None:
    """Let `allocator` evict those tensors that are its buffers."""
    for tensor in tensors:
        if allocator.owns(tensor):
            allocator.evict(tensor)


def build_model(recipe: Recipe, allocator: Allocator) -> tuple[nn.Module, frozenset[str]]:
    """Build the recipe's model with its initial weights. Return it with the names of pending parameters, whose values
    the recipe's weight files will supply. Raises ConfigError.

    The weights are a function of the recipe and its seed alone. allocator: holds the model's tensors until the
    model is laid out. If they are on disk, the full model is never in memory, and neither are large pending parameters.
    """
    weights = recipe.initial_weights
    if weights is None:
        return _build(recipe, allocator), frozenset()
    with Unwritten():
        model = _build(recipe, allocator)
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    initialised = {param for param in names if weights.may_lack(names[param])}
    pending = frozenset(names[param][0] for param in names.keys() - initialised)
    if any(map(is_unwritten, initialised)):
        # A large parameter keeps its initial value, which depends on all random numbers drawn before it. So all
        # parameters are initialised.
        model = _build(recipe, allocator)
    return model, pending


def _build(recipe: Recipe, allocator: Allocator) -> nn.Module:
    with preserved_generators(), BuiltAt(allocator) if allocator.on_disk else nullcontext():
        seed_generators(derive(recipe.seed, "init"))
        model = recipe.model()
    if not isinstance(model, nn.Module):
        raise ConfigError("recipe.model did not return a model", expected="a torch.nn.Module", got=repr(model))
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConfigError(
            f"recipe.model returned a model inside {type(model).__name__}",
            hint="return the model itself: Manyhands adds the gradients of all workers",
        )
    admit(model)
    return model
