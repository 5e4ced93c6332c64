"""One worker of the train command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

from manyhands.errors import Interrupted
from manyhands.members.reports import PARENT_REPORTS_VARIABLE, record_failure, traceback_of
from manyhands.surroundings import StopSignals


def work(request: Mapping[str, object]) -> int:
    """Train as this worker of its launcher; the exit code. Errors are left for the parent, which shows the one that
    matters, if it's ours."""
    try:
        with StopSignals() as stop:
            _train(request, stop)
    except (Interrupted, KeyboardInterrupt) as error:
        record_failure(error)
        return 130
    except BaseException as error:  # whatever it is, the parent must hear of it
        record_failure(error)
        told = (
            os.environ.get(PARENT_REPORTS_VARIABLE) and int(os.environ["RANK"]) == 0
        )  # on the terminal, by the parent
        if not told:
            sys.stderr.write(f"{traceback_of(error)}\n")
        return 1
    return 0


def _train(request: Mapping[str, object], stop: StopSignals) -> None:
    from rich.console import Console

    from manyhands.documents.recipe_file import load_recipe
    from manyhands.listeners.summary import render, to_json
    from manyhands.training.loop import train

    loaded = load_recipe(str(request["recipe"]), request["overrides"])  # type: ignore[arg-type]
    summary = train(
        loaded.recipe,
        steps=request["steps"],  # type: ignore[arg-type]
        strategy=loaded.strategy,
        run_dir=str(request["run_dir"]),
        checkpoint_every=request["checkpoint_every"],  # type: ignore[arg-type]
        checkpoint_dir=request["checkpoint_dir"],  # type: ignore[arg-type]
        keep_checkpoints=request["keep_checkpoints"],  # type: ignore[arg-type]
        keep_every=request["keep_every"],  # type: ignore[arg-type]
        digest_every=request["digest_every"],  # type: ignore[arg-type]
        accept_new_numerics=bool(request["accept_new_numerics"]),
        recipe_as_used=loaded.settings,
        stop=stop,
    )
    if int(os.environ["RANK"]) == 0:
        console = Console(stderr=bool(request["json"]), highlight=False)
        console.print(render(summary))
        if request["json"]:
            sys.stdout.write(json.dumps(to_json(summary)) + "\n")


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[1])))
