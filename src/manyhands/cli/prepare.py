"""The prepare command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from manyhands.cli.parameters import overrides_option, with_parameters
from manyhands.output import say
from manyhands.prepare.options import Options


@dataclass(frozen=True)
class PrepareArguments:
    """The parameters of the prepare command, in addition to the options of every data job."""

    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="The recipe of the corpus: a TOML file.", show_default=False)
    ]
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder for the tokens and the data card (default: prepared/NAME).",
            show_default=False,
        ),
    ] = None
    set_: Annotated[list[str] | None, overrides_option("such as tokenizer.vocabulary=8192")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the summary.")] = False


@with_parameters(PrepareArguments, Options, after="recipe")
def prepare_command(arguments: PrepareArguments, options: dict[str, Any]) -> None:
    """Prepare documents for training: clean them, remove duplicates, and write shuffled tokens and a data card.

    The output has the same bytes with any number of workers and any memory. After a kill or Ctrl-C, the same command
    resumes.

    Example: `manyhands prepare corpus.toml --workers 4 --set tokenizer.vocabulary=8192`
    """
    from manyhands.corpus.job import prepare_corpus
    from manyhands.corpus.recipe import read_corpus_recipe

    job_options = Options(**options)
    document = read_corpus_recipe(arguments.recipe, arguments.set_ or [])
    summary = prepare_corpus(document, arguments.out or Path("prepared") / document.schema.name, job_options)
    say(json.dumps(summary.to_json()) if arguments.as_json else str(summary), to_stdout=True)
