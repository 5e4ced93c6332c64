"""Runs a manyhands command in this process, with the arguments of a command line."""

from __future__ import annotations

import sys

import pytest

from manyhands.cli import main as cli


def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str]:
    """Run a command that starts no workers. Return its exit code and output."""
    monkeypatch.setattr(sys, "argv", ["manyhands", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out + err
