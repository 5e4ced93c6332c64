"""The sample command."""

from __future__ import annotations

from manyhands.cli.parameters import with_arguments
from manyhands.cli.saved_run import CheckpointArguments


@with_arguments(CheckpointArguments)
def sample_command(arguments: CheckpointArguments) -> None:
    """Print the text that the recipe's sample function returns for a checkpoint.

    The text is the same for any number of workers. Nothing is written to the run.

    Example: `manyhands sample recipe.toml runs/first --step 500`
    """
    arguments.start_workers(sample=arguments.checkpoint())
