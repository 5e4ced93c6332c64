"""The annotated tree of the source in docs/design.md, from the first line of each file's docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.layers import LAYERS

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "manyhands"
BLOCK = re.compile(r"(?<=^```text\n)src/manyhands/\n.*?(?=^```$)", re.MULTILINE | re.DOTALL)


def purpose(path: Path) -> str:
    """The first line of a file's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0].removesuffix(".")


def annotated_tree() -> str:
    """The tree as docs/design.md shows it, packages in the order of the layers."""
    rows = [("  __init__.py", purpose(SOURCE / "__init__.py"))]
    for layer in LAYERS.values():
        for name in layer:
            rows += _rows(SOURCE / name if (SOURCE / name).is_dir() else SOURCE / f"{name}.py", depth=1)
    width = max(len(name) for name, _ in rows) + 2
    return "src/manyhands/\n" + "".join(f"{name:{width}}{text}\n" for name, text in rows)


def _rows(path: Path, depth: int) -> Iterator[tuple[str, str]]:
    indent = "  " * depth
    if path.is_file():
        yield f"{indent}{path.name}", purpose(path)
        return
    yield f"{indent}{path.name}/", purpose(path / "__init__.py")
    entries = [entry for entry in path.iterdir() if entry.name not in ("__init__.py", "__pycache__")]
    for entry in sorted(entries, key=lambda entry: (entry.is_dir(), entry.name)):
        yield from _rows(entry, depth + 1)
