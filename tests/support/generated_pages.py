"""Writes what the documents derive from the source: docs/cli.md, and the annotated tree in docs/design.md.

PYTHONPATH=tests python -m support.generated_pages
"""

from __future__ import annotations

from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from manyhands.cli.main import app
from support.annotated_tree import write_tree

CLI_PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def command_line_page() -> str:
    """docs/cli.md: every command with its options, as typer describes them."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="manyhands")
    return get_docs_for_click(obj=command, ctx=context, name="manyhands", title="Command line")


if __name__ == "__main__":
    write_tree()
    CLI_PAGE.write_text(command_line_page(), encoding="utf-8")
