"""Plain values: None, numbers, text, and lists, tuples and dicts of these. They can be compared, copied and saved."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

_PAIRS, _TUPLE = "pairs of a dict", "items of a tuple"


def is_plain(value: Any) -> bool:
    """Return True if `value` is plain.

    A NumPy number is plain only if its type derives from a Python type, as np.float64 does.
    """
    if type(value) in (dict, Counter):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def copied(value: Any) -> Any:
    """Return a copy of a plain value that shares no list or dict with it."""
    if isinstance(value, dict):
        return type(value)({key: copied(item) for key, item in value.items()})
    if isinstance(value, list):
        return [copied(item) for item in value]
    return tuple(map(copied, value)) if type(value) is tuple else value


def encode_state(value: Any) -> Any:
    """Return a plain value as JSON values: tuples, and dicts with keys that are not strings, become marked lists."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode_state(item) for key, item in value.items()}
    if isinstance(value, dict):
        pairs = [[encode_state(key), encode_state(item)] for key, item in value.items()]
        return {_PAIRS: pairs, "type": type(value).__name__}
    if isinstance(value, tuple):
        return {_TUPLE: [encode_state(item) for item in value]}
    return [encode_state(item) for item in value] if isinstance(value, list) else value


def decode_state(value: Any) -> Any:
    """Return the value that `encode_state` encoded."""
    if isinstance(value, dict) and _PAIRS in value:
        kind = Counter if value["type"] == "Counter" else dict
        return kind({decode_state(key): decode_state(item) for key, item in value[_PAIRS]})
    if isinstance(value, dict) and _TUPLE in value:
        return tuple(decode_state(item) for item in value[_TUPLE])
    if isinstance(value, dict):
        return {key: decode_state(item) for key, item in value.items()}
    return [decode_state(item) for item in value] if isinstance(value, list) else value


def exactly_encoded(value: Any) -> Any:
    """Return `encode_state` of the value, or None if the encoded value would not give the same value again."""
    try:
        encoded = encode_state(value)
        text = json.dumps(encoded)
        decoded = decode_state(json.loads(text))
        # The text is equal for NaN, too, which doesn't equal itself.
        exact = bool(decoded == value) or (is_plain(value) and json.dumps(encode_state(decoded)) == text)
    except (TypeError, ValueError):  # JSON can't hold a value, or the comparison of arrays has no single truth value
        return None
    return encoded if exact else None
