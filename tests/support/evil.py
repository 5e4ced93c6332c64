"""A value whose pickle is an attack."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class Evil:
    """Its pickle creates the folder `proof` when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.proof),)
