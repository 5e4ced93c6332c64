"""Writes what documents derive from the source: docs/cli.md, and the layers and the annotated tree in docs/design.md.

PYTHONPATH=tests python -m support.generated_pages
"""

from __future__ import annotations

import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from manyhands.cli.main import app
from support.annotated_tree import BLOCK, annotated_tree
from support.layers import DIAGRAM, layer_diagram

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLI_PAGE = DOCS / "cli.md"
DESIGN_PAGE = DOCS / "design.md"


def command_line_page() -> str:
    """docs/cli.md: every command with its options, as typer describes them."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="manyhands")
    page = get_docs_for_click(obj=command, ctx=context, name="manyhands", title="Command line")
    for name, each in command.commands.items():  # typer cuts off long sentences
        summary = " ".join((each.help or "").split("\n\n")[0].split())
        page = re.sub(rf"^\* `{name}`: .*$", lambda _, line=f"* `{name}`: {summary}": line, page, flags=re.MULTILINE)
    return page


def design_page() -> str:
    """docs/design.md with the current layers and the current annotated tree."""
    page = DESIGN_PAGE.read_text(encoding="utf-8")
    page = DIAGRAM.sub(lambda _: layer_diagram(), page, count=1)
    return BLOCK.sub(lambda _: annotated_tree(), page, count=1)


if __name__ == "__main__":
    DESIGN_PAGE.write_text(design_page(), encoding="utf-8")
    CLI_PAGE.write_text(command_line_page(), encoding="utf-8")
