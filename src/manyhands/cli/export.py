"""The export command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.config import PRECISIONS
from manyhands.formatting import format_bytes, format_count, format_seconds, printable
from manyhands.output import say
from manyhands.validation import AVERAGED, TRAINED

if TYPE_CHECKING:
    from manyhands.checkpoint.export import ExportSummary


def export_command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run directory, or a folder or address of checkpoints.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder: new or empty.", show_default=False)],
    step: Annotated[
        int | None,
        typer.Option(metavar="N", help="The checkpoint after N steps (default: the last).", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Write parameters as {' or '.join(PRECISIONS)} (default: as the recipe trained them).",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{TRAINED}: the weights that the last step left; {AVERAGED}: their average, of any kind.",
        ),
    ] = TRAINED,
    max_shard_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="The largest size of a file, such as 500MiB (default: 5GB).",
            show_default=False,
        ),
    ] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the summary.")] = False,
) -> None:
    """Write a run's weights as safetensors that Hugging Face's `from_pretrained` loads.

    The weights are streamed from the checkpoint's files and verified, so the full model is never in memory. OUT appears
    only when it is complete.

    Example: `manyhands export runs/first exported --dtype bf16`
    """
    from manyhands.checkpoint.export import export as export
    from manyhands.listeners.terminal import BytesProgress

    with BytesProgress("exporting") as bar:
        summary = export(
            run, out, step=step, dtype=dtype, weights=weights, max_shard_size=max_shard_size, progress=bar.update
        )
    result = asdict(summary) | {"has_config": summary.has_config}
    say(json.dumps(result) if as_json else printable(explain_export(summary)), to_stdout=True)


def explain_export(summary: ExportSummary) -> str:
    """Return the summary as text for people."""
    speed = summary.weights_bytes / summary.seconds if summary.seconds > 0 else 0.0
    shown = summary.files if len(summary.files) <= 8 else [*summary.files[:3], "...", *summary.files[-2:]]
    what = "weights" if summary.weights == TRAINED else "average of the weights"
    lines = [
        f"exported the {what} after step {summary.step} to {summary.out}",
        f"  weights     {format_bytes(summary.weights_bytes)} in {summary.dtype}: "
        f"{format_count(summary.parameters)} parameters, {summary.tensors:,} tensors, "
        f"in {format_seconds(summary.seconds)} ({format_bytes(speed)}/s)",
        f"  files       {len(summary.files)}: {', '.join(shown)}",
        f"  checkpoint  {summary.checkpoint}",
        f"  digest      {summary.digest}",
    ]
    if summary.weights != TRAINED:
        lines.append("  buffers are not averaged: they are the current ones, such as batch norm's running statistics")
    if not summary.has_config:
        lines.append("  no config.json, because the model has no Hugging Face config: load the files by name")
    return "\n".join(lines)
