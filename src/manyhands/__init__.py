"""Manyhands: train one PyTorch model on many workers, with the same bits for any number of them.

Names are imported when they are first used, so that importing the package itself is fast and starts nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhands import listeners, metrics
    from manyhands.average import Average
    from manyhands.checkpoint.export import ExportSummary, export
    from manyhands.checkpoint.plain_model import load_model
    from manyhands.config import Batch, Recipe, Strategy
    from manyhands.data.array_file import ArrayFile
    from manyhands.data.sample_order import by_length, weighted
    from manyhands.data.token_file import TokenFile
    from manyhands.documents.recipe_file import load_recipe
    from manyhands.engine.step.figures import Evaluation
    from manyhands.engine.step.metrics import StepMetrics
    from manyhands.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        Interrupted,
        InvariantError,
        ManyhandsError,
        NumericsError,
        WorkerError,
    )
    from manyhands.islands import Averaging, Islands, Nesterov
    from manyhands.launching.function import launch
    from manyhands.listeners.listener import Listener, stop
    from manyhands.listeners.summary import Summary
    from manyhands.numerics.digest import digest_of_tensors
    from manyhands.prepare.dataset import Dataset
    from manyhands.prepare.gridded.layout import ZarrLayout
    from manyhands.prepare.job.output import PrepareSummary
    from manyhands.prepare.records.aggregate import Aggregate
    from manyhands.streams import Stream
    from manyhands.training.dry_run import DryRun, dry_run
    from manyhands.training.engine import Engine
    from manyhands.training.finished import evaluate
    from manyhands.training.loop import train
    from manyhands.validation import Validation
    from manyhands.weights import Weights

__version__ = "0.1.0"

_WHERE = {
    "Aggregate": "prepare.records.aggregate",
    "ArrayFile": "data.array_file",
    "Average": "average",
    "Averaging": "islands",
    "Batch": "config",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Dataset": "prepare.dataset",
    "DryRun": "training.dry_run",
    "Engine": "training.engine",
    "Evaluation": "engine.step.figures",
    "ExportSummary": "checkpoint.export",
    "Interrupted": "errors",
    "InvariantError": "errors",
    "Islands": "islands",
    "Listener": "listeners.listener",
    "ManyhandsError": "errors",
    "Nesterov": "islands",
    "NumericsError": "errors",
    "PrepareSummary": "prepare.job.output",
    "Recipe": "config",
    "StepMetrics": "engine.step.metrics",
    "Strategy": "config",
    "Stream": "streams",
    "Summary": "listeners.summary",
    "TokenFile": "data.token_file",
    "Validation": "validation",
    "Weights": "weights",
    "WorkerError": "errors",
    "ZarrLayout": "prepare.gridded.layout",
    "by_length": "data.sample_order",
    "digest_of_tensors": "numerics.digest",
    "dry_run": "training.dry_run",
    "evaluate": "training.finished",
    "export": "checkpoint.export",
    "launch": "launching.function",
    "listeners": "listeners",
    "load_model": "checkpoint.plain_model",
    "load_recipe": "documents.recipe_file",
    "metrics": "metrics",
    "stop": "listeners.listener",
    "train": "training.loop",
    "weighted": "data.sample_order",
}

__all__ = [
    "Aggregate",
    "ArrayFile",
    "Average",
    "Averaging",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Dataset",
    "DryRun",
    "Engine",
    "Evaluation",
    "ExportSummary",
    "Interrupted",
    "InvariantError",
    "Islands",
    "Listener",
    "ManyhandsError",
    "Nesterov",
    "NumericsError",
    "PrepareSummary",
    "Recipe",
    "StepMetrics",
    "Strategy",
    "Stream",
    "Summary",
    "TokenFile",
    "Validation",
    "Weights",
    "WorkerError",
    "ZarrLayout",
    "by_length",
    "digest_of_tensors",
    "dry_run",
    "evaluate",
    "export",
    "launch",
    "listeners",
    "load_model",
    "load_recipe",
    "metrics",
    "stop",
    "train",
    "weighted",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'manyhands' has no attribute {name!r}")
    module = importlib.import_module(f"manyhands.{_WHERE[name]}")
    value = module if name == _WHERE[name] else getattr(module, name)
    globals()[name] = value
    return value
