"""The one function that all counted randomness comes from. It needs no torch: preparing data starts quickly."""

from __future__ import annotations

import hashlib
import operator

_DOMAIN = b"manyhands seed 1;"


def derive(seed: int, *counters: int | str) -> int:
    """The seed for one purpose: 63 bits of SHA-256 over the canonical encoding of `(seed, *counters)`.

    Integers and strings are told apart (`1` isn't `"1"`), and no two different tuples have the same encoding.
    Deterministic: the same number on every machine and in every version of Python, numpy and torch.
    Raises TypeError for a counter that is neither a whole number nor a string.
    """
    encoded = bytearray(_DOMAIN)
    for counter in (seed, *counters):
        if isinstance(counter, str):
            text = counter.encode()
            encoded += b"s%d:%b;" % (len(text), text)
        else:
            encoded += b"i%d;" % operator.index(counter)
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") >> 1
