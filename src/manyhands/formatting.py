"""Counts, bytes and seconds as text for people."""

from __future__ import annotations

import math
import unicodedata

MIB = 2**20

GIB = 2**30


def format_count(count: float) -> str:
    """Format a count: `950`, `12.3 k`, `69.4 M`, `1.50 B`, `2.00 T`."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * unit:
            return f"{_three_digits(count / unit)} {name}"
    return f"{count:.0f}" if float(count).is_integer() or abs(count) >= 100 else f"{count:.3g}"


def format_bytes(count: float) -> str:
    """Format an amount of memory or disk space: `950 B`, `12.3 KiB`, `1.95 MiB`, `4.66 GiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if abs(count) >= 0.9995 * unit:
            return f"{_three_digits(count / unit)} {name}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Format a duration: `85 µs`, `12.3 ms`, `1.74 s`, `2 min 05 s`, `3 h 07 min`, `2 d 04 h`, or `?` if it is
    unknown.
    """
    if not math.isfinite(seconds):
        return "?"
    if abs(seconds) < 59.95:
        for unit, name in ((1.0, "s"), (1e-3, "ms")):
            if abs(seconds) >= 0.9995 * unit:
                return f"{_three_digits(seconds / unit)} {name}"
        return f"{seconds * 1e6:.0f} µs"
    rounded = round(seconds)
    if abs(rounded) < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    if abs(rounded) < 2 * 86400:
        return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
    return f"{rounded // 86400} d {rounded % 86400 // 3600:02d} h"


def _three_digits(value: float) -> str:
    """Format a value with at least three significant digits and as few decimals as possible: 1.74, 12.3, 812, 1,191."""
    size = abs(value)
    return f"{value:,.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def printable(text: str) -> str:
    """Escape text from a file or the network, so that a terminal shows it but executes no control sequences in it.

    Control characters except newlines and tabs, and marks that reverse or hide text, are written as escapes: `\\x1b`.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character.encode("unicode_escape").decode()
        for character in text
    )
