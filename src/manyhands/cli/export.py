"""The export command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.saved_run import ChosenStep, ChosenWeights, SavedRun
from manyhands.config import PRECISIONS
from manyhands.formatting import format_bytes, format_count, format_seconds, printable
from manyhands.output import say
from manyhands.validation import AVERAGED, TRAINED

if TYPE_CHECKING:
    from manyhands.checkpoint.export import ExportSummary


def export_command(
    run: SavedRun,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder: new or empty.", show_default=False)],
    step: ChosenStep = None,
    weights: ChosenWeights = TRAINED,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Write parameters as {' or '.join(PRECISIONS)} (default: as the recipe trained them).",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="The largest size of a file, such as 500MiB (default: 5GB).",
            show_default=False,
        ),
    ] = "5GB",
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Add the LoRA adapter of a peft model to the weights of its base model."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the summary.")] = False,
) -> None:
    """Write a run's weights as safetensors that Hugging Face's `from_pretrained` loads.

    Of a peft model, the adapter alone is written, for `PeftModel.from_pretrained`, unless --merge is given.

    The weights are streamed from the checkpoint's files and verified, so the full model is never in memory. OUT appears
    only when it is complete.

    Example: `manyhands export runs/first exported --dtype bf16`
    """
    from manyhands.checkpoint.export import export as export
    from manyhands.listeners.terminal import BytesProgress

    with BytesProgress("exporting") as bar:
        summary = export(
            run,
            out,
            step=step,
            weights=weights,
            dtype=dtype,
            max_shard_size=max_shard_size,
            merge=merge,
            progress=bar.update,
        )
    result = asdict(summary) | {"has_config": summary.has_config}
    say(json.dumps(result) if as_json else printable(explain_export(summary)), to_stdout=True)


def explain_export(summary: ExportSummary) -> str:
    """Return the summary as text for people."""
    speed = summary.weights_bytes / summary.seconds if summary.seconds > 0 else 0.0
    shown = summary.files if len(summary.files) <= 8 else [*summary.files[:3], "...", *summary.files[-2:]]
    what = "average of the weights" if summary.weights == AVERAGED else "weights"
    what = {"model": what, "adapter": f"{what} of the adapter", "merged": f"merged {what}"}[summary.form]
    lines = [
        f"exported the {what} after step {summary.step} to {summary.out}",
        f"  weights     {format_bytes(summary.weights_bytes)} in {summary.dtype}: "
        f"{format_count(summary.parameters)} parameters, {summary.tensors:,} tensors, "
        f"in {format_seconds(summary.seconds)} ({format_bytes(speed)}/s)",
        f"  files       {len(summary.files)}: {', '.join(shown)}",
        f"  checkpoint  {summary.checkpoint}",
        f"  digest      {summary.digest}",
    ]
    if summary.weights == AVERAGED:
        lines.append("  buffers are not averaged: they are the current ones, such as batch norm's running statistics")
    if summary.form == "adapter":
        lines.append(f"  load with   PeftModel.from_pretrained(base model, {summary.out!r})")
    elif not summary.has_config:
        lines.append("  no config.json, because the model has no Hugging Face config: load the files by name")
    return "\n".join(lines)
