"""A command of manyhands's in this process, as a person types it."""

from __future__ import annotations

import sys

import pytest

from manyhands.cli import main as cli


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and output of a command that starts no workers."""
    monkeypatch.setattr(sys, "argv", ["manyhands", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out + err
