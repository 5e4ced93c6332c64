"""The doctor command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.formatting import printable
from manyhands.output import console as stdout_console
from manyhands.output import say

if TYPE_CHECKING:
    from rich.console import Console

    from manyhands.doctor.machines import Finding
    from manyhands.doctor.runs import RunHistory

_MARKS = {"good": "[green]✓[/]", "warning": "[yellow]![/]", "bad": "[red]✗[/]"}


def doctor_command(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A run directory: explain what happened to the run. Or the folder or address where the islands of a "
            "run meet (--islands-at): report how far they are, and whom they wait for.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--run-dir", metavar="DIR", help="Where runs will be written (default: runs).", show_default=False
        ),
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Check this machine before a run. With a run directory, explain what happened to the run, and what to do.
    With the place where islands meet, report how far they are, and who computes them.

    If a launcher starts the command on several machines, it also compares the properties that must be the same on all
    of them, and measures the speed of the network: `torchrun --nnodes 2 … -m manyhands.cli.main doctor`.

    The exit code is 1 if a check failed, or if the run failed.

    Example: `manyhands doctor runs/first`
    """
    console = stdout_console(stderr=False)
    if run is not None and _is_meeting(run):
        _report_islands(run, console, as_json=as_json)
        return
    if run is not None:
        from manyhands.doctor.runs import run_history
        from manyhands.listeners.run_directory import RunDirectory

        history = run_history(RunDirectory.open_existing(Path(run)))
        if as_json:
            say(json.dumps(asdict(history)), to_stdout=True)
        else:
            _show_history(history, console)
        raise typer.Exit(1 if history.outcome in ("failed", "killed") else 0)
    prints = int(os.environ.get("RANK", "0")) == 0  # the other workers only take part in the checks
    found: list[Finding] = []
    for finding in _check(folder, found):
        found.append(finding)
        if prints and not as_json:
            _show_finding(finding, console)
    if prints and as_json:
        say(json.dumps({"findings": [asdict(finding) for finding in found]}), to_stdout=True)
    raise typer.Exit(1 if any(finding.verdict == "bad" for finding in found) else 0)


def _is_meeting(place: str) -> bool:
    from manyhands.rounds.store import ISLANDS
    from manyhands.storage.location import is_local

    return not is_local(place) or (Path(place) / ISLANDS).is_file()


def _report_islands(place: str, console: Console, *, as_json: bool) -> None:
    from rich import markup
    from rich.table import Table

    from manyhands.doctor.islands import WATCHED_SECONDS, described, islands_report
    from manyhands.storage.location import location_of

    if not as_json:
        say(f"observing the clusters for {WATCHED_SECONDS:.0f} seconds ...")
    report = islands_report(location_of(place), say)
    if as_json:
        say(json.dumps({**asdict(report), "summary": report.summary, "advice": report.advice}), to_stdout=True)
        return
    console.print(markup.escape(printable(report.summary)))
    table = Table.grid(padding=(0, 2))
    for title in ("island", f"round {report.round}", "newest state", "computed by"):
        table.add_column(title)
    table.add_row("island", f"round {report.round}", "newest state", "computed by", style="dim")
    for island in report.islands:
        table.add_row(*(markup.escape(printable(text)) for text in described(island)))
    console.print(table)
    console.print(f"what to do: {markup.escape(printable(report.advice))}")


def _check(folder: Path, found: list[Finding]) -> Iterable[Finding]:
    from manyhands.doctor.machines import check_machine

    yield from check_machine(folder)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from manyhands.doctor.machines import check_hosts

        yield from check_hosts(found)


def _show_finding(finding: Finding, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    row = Table.grid(padding=(0, 1))
    for width in (1, 14, None):
        row.add_column(width=width)
    row.add_row(_MARKS[finding.verdict], escape(finding.subject), escape(finding.message))
    if finding.hint is not None:
        row.add_row("", "", f"[dim]what to do: {escape(finding.hint)}[/]")
    console.print(row)


def _show_history(history: RunHistory, console: Console) -> None:
    from rich import markup
    from rich.table import Table

    from manyhands.doctor.runs import took, when

    def escape(text: str) -> str:
        """Return text of the run directory for rich and for the terminal. The text is not trusted."""
        return markup.escape(printable(text))

    colour = {"ended": "green", "failed": "red", "killed": "red"}.get(history.outcome, "yellow")
    console.print(f"[{colour}]{escape(history.summary)}[/]")
    table = Table.grid(padding=(0, 2))
    for style in ("dim", "dim", ""):
        table.add_column(style=style, no_wrap=style == "dim", justify="left")
    for index, (seconds, text) in enumerate(history.lines):
        table.add_row(when(seconds), took(history.lines, index), escape(text))
    console.print(table)
    for name, tail in history.tails.items():
        console.print(f"[dim]the last lines of logs/{name}:[/]")
        console.print(escape(tail))
    console.print(f"what to do: {escape(history.advice)}")
