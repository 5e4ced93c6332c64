"""The prepare command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from manyhands.cli.workers import check_from_one

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-n",
        metavar="N",
        callback=check_from_one,
        help="Worker processes on this machine (default: one a CPU).",
        show_default=False,
    ),
]

Engine = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where tasks run, if not here: dask://host:8786, ray, ray://host:10001; or which part this is: "
        "'rank 2 of 8', or ranks, as Slurm and others say.",
        show_default=False,
    ),
]


def prepare_command(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="The corpus's recipe: a TOML file.", show_default=False)
    ],
    workers: Workers = None,
    engine: Engine = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For all workers together: 2GiB, 512MiB (default: 70 % of the machine's).",
            show_default=False,
        ),
    ] = None,
    max_bad_records: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="How many records may be set aside (default: 0).", show_default=False),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where tokens and card go (default: prepared/NAME).", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a value of the recipe, such as tokenizer.vocabulary=8192. Repeat as needed.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the summary.")] = False,
) -> None:
    """Prepare documents for training: clean, without duplicates, as tokens in a random order, with a data card.

    The same bytes with any number of workers and any memory. Killed or stopped by Ctrl-C, the same command goes on.

    Example: `manyhands prepare corpus.toml --workers 4 --set tokenizer.vocabulary=8192`
    """
    from manyhands.corpus.job import prepare_corpus
    from manyhands.corpus.recipe import read_corpus_recipe
    from manyhands.prepare.options import Options

    options = Options(workers=workers, memory=memory, max_bad_records=max_bad_records, engine=engine)
    document = read_corpus_recipe(recipe, set_ or [])
    summary = prepare_corpus(document, out or Path("prepared") / document.schema.name, options)
    typer.echo(json.dumps(summary.to_json()) if as_json else str(summary))
