"""Values of any length that workers exchange, and facts that must be the same on all workers.

A fact is a name and a value. Both are strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch

from manyhands.comm.group import Group
from manyhands.errors import ConfigError


def all_gather_bytes(group: Group, value: bytes, tag: str) -> list[bytes]:
    """Return all workers' bytes, by rank. Collective. Makes two collective calls."""
    lengths = [int(length) for length in group.all_gather_small(torch.tensor([len(value)]), tag)]
    if not any(lengths):
        return [b""] * len(lengths)
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    if value:
        padded[: len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    values = group.all_gather_small(padded, tag)
    return [bytes(other[:length].numpy()) for other, length in zip(values, lengths, strict=True)]


def all_gather_json(group: Group, value: object, tag: str) -> list[object]:
    """Return all workers' values, by rank. Collective. Makes two collective calls, which is too slow for every step."""
    return [json.loads(text) for text in all_gather_bytes(group, json.dumps(value).encode(), tag)]


def agree(group: Group, what: str, facts: Mapping[str, str], *, hint: str) -> None:
    """Check that all workers have the same facts. Collective. Raises the same ConfigError on all of them."""
    all_facts: Sequence[dict[str, str]] = all_gather_json(group, dict(facts), f"start / {what} / control")  # type: ignore[assignment]
    for rank, theirs in enumerate(all_facts):
        for name in [*all_facts[0], *theirs]:
            first, other = all_facts[0].get(name, "nothing"), theirs.get(name, "nothing")
            if first != other:
                raise ConfigError(
                    f"workers 0 and {group.workers[rank]} don't have the same {what}: they differ in {name}",
                    expected=f"{first} (worker 0)",
                    got=f"{other} (worker {group.workers[rank]})",
                    hint=hint,
                )
