"""The data set of examples/gpt: the standard library's source text, byte by byte."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "gpt"))

from text import StandardLibraryText

__all__ = ["StandardLibraryText"]
