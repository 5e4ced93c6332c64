"""Checks functions that users pass, and their results, and names the functions in errors."""

from __future__ import annotations

import functools
import inspect
import signal
import types
from collections.abc import Iterator
from typing import Any

from manyhands.errors import ConfigError, InvariantError

_UNFINISHED = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)

# `map` and `filter` mistake a StopIteration that their function raises for the end of the items.
ENDS_EARLY = frozenset((map, filter))


class BadResult(ValueError):
    """The error for a result of a user's function that can't be used."""


def name_of(function: Any) -> str:
    """Return the name of a function for messages and plans: `lambda` for a lambda, and the class for other
    callables.
    """
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else str(name)


def shown(value: Any, most_characters: int = 200) -> str:
    """Return the start of a value's `repr` for messages."""
    try:
        return repr(value)[:most_characters]
    except ValueError:  # Python refuses to convert integers of more than 4,300 digits to text
        return f"a {type(value).__name__}"


def check_job_function(function: Any, argument: str, *, may_generate: bool = False) -> None:
    """Raise ConfigError unless `function` is a plain function, which returns its result when it is called.

    argument: the argument that the caller passed, for messages. may_generate: True if generator functions are allowed.
    """
    if not callable(function):
        raise ConfigError(f"{argument} is not a function", got=repr(function)[:200])
    called = _called(function)
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise ConfigError(
            f"{argument} is an async function",
            expected="a function that returns its result when it is called",
            got=name_of(function),
            hint="remove async, or wait for the result in a plain function: lambda record: asyncio.run(f(record))",
        )
    if inspect.isgeneratorfunction(called) and not may_generate:
        raise ConfigError(
            f"{argument} is a generator function",
            expected="a function that returns its result when it is called",
            got=name_of(function),
            hint="replace yield by return; flat_map accepts generator functions",
        )


def _called(function: Any) -> Any:
    """Return the function whose code runs when `function` is called.

    A wrapper of functools.wraps is not unwrapped, because it may run a coroutine to its end. `check_results` detects
    the results of wrappers that don't.
    """
    for _ in range(100):  # the number is limited, because an object may refer to itself
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, (functools._lru_cache_wrapper, staticmethod)):
            function = function.__wrapped__
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif isinstance(function, (type, types.FunctionType)):
            break
        else:
            method = type(function).__call__
            if not isinstance(method, (types.FunctionType, functools._lru_cache_wrapper)):
                break
            function = method
    return function


def check_results(results: list[Any], function: Any, *, is_read: bool = False) -> set[type]:
    """Return the types of the results. Raises BadResult for a coroutine or a generator, which is not yet a value.

    is_read: True if only the result itself is used, as a key or a condition. Then an iterator is refused, too.
    """
    kinds = set(map(type, results))
    for kind in kinds:
        if not (issubclass(kind, _UNFINISHED) or hasattr(kind, "__await__") or (is_read and hasattr(kind, "__next__"))):
            continue
        for result in results:
            if isinstance(result, types.CoroutineType):
                result.close()  # otherwise Python warns that it was never awaited
        raise BadResult(
            f"{name_of(function)} returned a {kind.__name__}, not a value: use a function without async and yield, "
            "which returns its result"
        )
    return kinds


def complete(items: Any) -> Iterator[Any]:
    """Yield all items of a `map` or `filter`. Raises RuntimeError if its function raises StopIteration."""
    kind, (function, *sources) = items.__reduce__()[:2]
    opened = [complete(source) if type(source) in ENDS_EARLY else source for source in sources]
    for arguments in zip(*opened, strict=False):
        if kind is map:
            yield function(*arguments)
        elif (function or bool)(*arguments):
            yield arguments[0]


def is_for_user(error: BaseException) -> bool:
    """Return True if a user's function raised the error, and False for a defect of Manyhands or a request to stop."""
    if isinstance(error, KeyboardInterrupt):
        # Workers ignore the signal of Ctrl-C, so in workers only a function can have raised this error.
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return not isinstance(error, (InvariantError, GeneratorExit))


def describe_error(error: BaseException, otherwise: str = "a function") -> str:
    """Describe an error in one line: the user's function that raised it, the error, file and line.

    otherwise: the name of the step, for functions without Python code.
    """
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
        error = error.__cause__  # a generator raised it
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, StopIteration) and not error.args:
        said += ": next() found no item"
    found = _users_frame(error.__traceback__)
    if found is None:
        return f"{otherwise} raised {said}"
    code = found.tb_frame.f_code
    name = code.co_qualname.rpartition("<locals>.")[2].replace("<lambda>", "lambda")
    # cloudpickle retains __file__, but not co_filename.
    file = found.tb_frame.f_globals.get("__file__", code.co_filename)
    return f"{name} raised {said} ({file}:{found.tb_lineno})"


def _users_frame(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Return the first frame of a function outside of data jobs, in the user's own code or else in a library."""
    library: types.TracebackType | None = None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        module = str(trace.tb_frame.f_globals.get("__name__"))
        # Frames of compiled libraries name source files, such as table.pxi, that users don't have.
        if not module.startswith(("manyhands.prepare.", "manyhands.numerics.")) and file.endswith((".py", ">")):
            if not ("site-packages" in file or "/lib/python" in file):
                return trace
            library = library or trace
        trace = trace.tb_next
    return library
