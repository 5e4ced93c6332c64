"""One worker process of train, evaluate or sample: builds Recipe and Strategy with load_recipe, and runs them.

The request comes from the command (see cli/run_arguments.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhands.errors import Interrupted
from manyhands.members.reports import PARENT_REPORTS_VARIABLE, end_work, record_failure, traceback_of
from manyhands.output import console, protect_output, say
from manyhands.surroundings import StopSignals


def work(request: Mapping[str, Any]) -> int:
    """Train, evaluate or sample as one worker of the launcher, and return the exit code.

    Records an error for the parent, and prints the traceback. Under Manyhands's launcher, worker 0 prints no traceback,
    because the launcher prints the root cause on the same terminal.
    """
    protect_output()
    try:
        with StopSignals() as stop:
            if "evaluation" in request:
                _evaluate(request)
            elif "dry_run" in request:
                _dry_run(request)
            elif "sample" in request:
                _sample(request)
            else:
                _train(request, stop)
        end_work()
    except (Interrupted, KeyboardInterrupt) as error:
        record_failure(error)
        return 130
    except BaseException as error:  # the parent must get a record of any error
        record_failure(error)
        # Worker 0 shares its terminal with the parent, which prints the root cause there. Without a run directory,
        # there are no log files, and the other workers share the terminal, too.
        shares_terminal = int(os.environ["RANK"]) == 0 or "run_dir" not in request
        parent_prints = os.environ.get(PARENT_REPORTS_VARIABLE) and shares_terminal
        if not parent_prints:
            say(traceback_of(error))
        return 1
    return 0


def _train(request: Mapping[str, Any], stop: StopSignals) -> None:
    from manyhands.documents.recipe_file import load_recipe
    from manyhands.engine.step.amendments import Amendments
    from manyhands.listeners.summary import render, to_json
    from manyhands.training.loop import train

    training = dict(request["training"])
    amendments = Amendments.from_json(training.pop("amendments"))
    loaded = load_recipe(request["recipe"], request["overrides"])
    summary = train(
        loaded.recipe,
        strategy=loaded.strategy,
        run_dir=request["run_dir"],
        recipe_as_used=loaded.settings | ({} if training["steps"] is None else {"steps": training["steps"]}),
        stop=stop,
        skip_steps=amendments.skipped,
        amendments=amendments.by_step(),
        listeners=[create(Path(request["run_dir"])) for create in loaded.listeners],
        **training,
    )
    if int(os.environ["RANK"]) == 0:
        console(stderr=request["json"]).print(render(summary))
        if request["json"]:
            say(json.dumps(to_json(summary)), to_stdout=True)


def _evaluate(request: Mapping[str, Any]) -> None:
    from manyhands.documents.recipe_file import load_recipe
    from manyhands.storage.json_lines import numbers
    from manyhands.training.finished import evaluate

    loaded = load_recipe(request["recipe"], request["overrides"])
    found = evaluate(loaded.recipe, strategy=loaded.strategy, show=not request["json"], **request["evaluation"])
    if request["json"] and int(os.environ["RANK"]) == 0:
        figures = {name: numbers(each.as_json()) for name, each in found.items()}
        say(json.dumps(figures), to_stdout=True)


def _sample(request: Mapping[str, Any]) -> None:
    from manyhands.documents.recipe_file import load_recipe
    from manyhands.training.finished import sample

    loaded = load_recipe(request["recipe"], request["overrides"])
    text = sample(loaded.recipe, strategy=loaded.strategy, **request["sample"])
    if text is not None:
        say(text, to_stdout=True)


def _dry_run(request: Mapping[str, Any]) -> None:
    from dataclasses import asdict

    from manyhands.documents.recipe_file import load_recipe
    from manyhands.training.dry_run import dry_run

    loaded = load_recipe(request["recipe"], request["overrides"])
    found = dry_run(loaded.recipe, strategy=loaded.strategy, show=not request["json"], **request["dry_run"])
    if request["json"] and int(os.environ["RANK"]) == 0:
        say(json.dumps(asdict(found) | {"total_seconds": found.total_seconds}), to_stdout=True)


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[1])))
