"""A record's key: the record itself, columns of it, or what a function makes of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import orjson

from manyhands.prepare.chunks import Chunk, records_of
from manyhands.prepare.operations import name_of
from manyhands.prepare.pipeline import BadKey

Key: TypeAlias = "Callable[[Any], Any] | tuple[str, ...] | None"
KeyLike: TypeAlias = "Callable[[Any], Any] | str | Sequence[str] | None"  # as users give it


def keys_of(chunk: Chunk, key: Key) -> list[Any]:
    """The keys of a chunk's records; of several columns, tuples. Raises BadKey for a column that isn't there."""
    records = records_of(chunk)
    if key is None:
        return records
    if not isinstance(key, tuple):
        return list(map(key, records))
    try:
        return list(map(itemgetter(*key), records))
    except KeyError as error:
        raise BadKey(f"the record has no column {error}") from error
    except TypeError as error:
        raise BadKey(f"the record has no columns: it is a {type(records[0]).__name__}, not a dict") from error


def values_of(records: list[Any], of: Callable[[Any], Any] | str | None) -> list[Any]:
    """What is aggregated of each record. Raises BadKey for a column that isn't there."""
    if of is None:
        return records
    return keys_of(records, (of,) if isinstance(of, str) else of)


def check_keys(keys: list[Any]) -> None:
    """Raise BadKey if a key has no place in an order: None, NaN, or a tuple with one of them."""
    kinds = set(map(type, keys))
    if kinds <= {str, int, bytes, bool}:
        return
    for key in keys:
        for part in key if isinstance(key, tuple) else (key,):
            if part is None:
                raise BadKey("the key is None: leave such records out, or give them a key of their own")
            if part != part:
                raise BadKey("the key is NaN, which equals nothing: leave such records out, or give them another key")


def content_key(record: Any) -> bytes:
    """16 bytes that stand for a whole record, whatever the order of its columns. Raises BadKey for what isn't plain."""
    text = isinstance(record, str)
    data = b"s" + record.encode("utf-8", "surrogatepass") if text else b"j" + _canonical(record)
    return hashlib.blake2b(data, digest_size=16).digest()


def _canonical(record: Any) -> bytes:
    try:
        made = orjson.dumps(record, _tagged, orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
        if b"null" in made:  # which stands for None, and for floats that JSON doesn't have
            made = orjson.dumps(_finite(record), _tagged, orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
        return made
    except TypeError as error:
        raise BadKey(
            f"a {type(record).__name__} can't be told from others by its content ({error}): use distinct(key=...)"
        ) from error


def _finite(value: Any) -> Any:
    """The same, with NaN and infinities as what equals nothing else."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"\0float": repr(value)}
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tagged(value: Any) -> Any:
    """For what JSON doesn't have: its type's name beside it, so that it equals nothing else."""
    if isinstance(value, (bytes, bytearray)):
        return {"\0bytes": value.hex()}
    if isinstance(value, (set, frozenset)):
        return {"\0set": sorted(orjson.dumps(item, _tagged).decode() for item in value)}
    if isinstance(value, int) or type(value).__module__ in ("datetime", "decimal", "uuid"):
        return {f"\0{type(value).__name__}": repr(value)}
    raise TypeError(f"type {type(value).__name__} has no canonical form")


def key_from(key: KeyLike) -> Key:
    """The key that a user has given."""
    if key is None or callable(key):
        return key
    return (key,) if isinstance(key, str) else tuple(key)


def columns_of(key: Key) -> tuple[str, ...]:
    """The columns that a key is made of; none if it is a function's, or the record."""
    return key if isinstance(key, tuple) else ()


def as_function(key: Key) -> Key:
    """As a function: operator.itemgetter gives what a key of these columns is."""
    return itemgetter(*key) if isinstance(key, tuple) else key


def key_name(key: KeyLike) -> str:
    """For messages and plans."""
    if key is None:
        return "the record"
    if callable(key):
        return name_of(key)
    return key if isinstance(key, str) else ", ".join(key)
