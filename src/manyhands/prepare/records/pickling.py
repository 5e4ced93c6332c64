"""Pickles of functions and objects, which workers load.

cloudpickle also pickles functions and classes that the script itself defines. This module adds a few objects of the
standard library that scripts use in their functions and classes.
"""

from __future__ import annotations

import functools
import io
import weakref
from collections import ChainMap
from collections.abc import Callable
from typing import Any, ClassVar

import cloudpickle  # type: ignore[import-untyped]

from manyhands.errors import ConfigError

_CACHED = type(functools.cache(len))


class NotPicklable(ConfigError):
    """The error for a value that can't leave this process."""


def pickled(value: Any) -> bytes:
    """Pickle a value with cloudpickle, which also supports what a script or notebook defines.

    Raises NotPicklable if the value can't be pickled.
    """
    try:
        return pickle_any(value)
    except Exception as error:
        raise cant_be_pickled(value, error) from error


def pickle_any(value: Any) -> bytes:
    """Do the same as `pickled`, but raise any error of the value."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def reduced(value: Any) -> Any:
    """Return the contents of the pickle of an object, as its method `__reduce_ex__` returns them.

    Raises NotPicklable if the object can't be pickled.
    """
    try:
        reduce = _Pickler.dispatch_table.get(type(value))
        return value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception as error:
        raise cant_be_pickled(value, error) from error


def cant_be_pickled(value: Any, error: Exception) -> NotPicklable:
    """Return the error for a value that can't be pickled because of `error`."""
    return NotPicklable(
        f"a function of the job can't be sent to the workers: {type(error).__name__}: {error}",
        got=repr(value)[:200],
        hint="the function, or an object that it uses, holds something that can't leave this process (a lock, an "
        "open file, a connection): create it inside the function",
    )


def _reduce_cached(function: Any) -> Any:
    """Pickle a cached function by the name under which workers can import it, or else by the function in the cache.

    In the second case, the worker creates a new wrapper, whose cache is empty.
    """
    if function.__module__ != "__main__" and "<" not in function.__qualname__:
        return function.__reduce__()
    parameters = function.cache_parameters()
    return _cached, (parameters["maxsize"], parameters["typed"], function.__wrapped__)


def _cached(maxsize: int | None, typed: bool, function: Callable[..., Any]) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _reduce_cached_property(value: Any) -> Any:
    """Pickle a cached property without its lock, which it has before Python 3.12."""
    state = {name: each for name, each in vars(value).items() if name not in ("func", "lock")}
    return type(value), (value.func,), state


def _reduce_weak_mapping(value: Any) -> Any:
    """Pickle a mapping with weak references, such as the cache of a `functools.singledispatch`, by its items."""
    return type(value), (), None, None, iter(list(value.items()))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """A pickler with reducers for objects that neither pickle nor cloudpickle supports."""

    dispatch_table: ClassVar[Any] = ChainMap(
        {
            _CACHED: _reduce_cached,
            functools.cached_property: _reduce_cached_property,
            weakref.WeakKeyDictionary: _reduce_weak_mapping,
            weakref.WeakValueDictionary: _reduce_weak_mapping,
        },
        cloudpickle.Pickler.dispatch_table,
    )
