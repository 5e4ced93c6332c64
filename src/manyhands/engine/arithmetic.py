"""This process's arithmetic, set as the recipe says: threads, and kernels that give the same bits every time."""

from __future__ import annotations

import os
from typing import Any

import torch

from manyhands.config import Recipe


def fix_arithmetic(recipe: Recipe) -> None:
    """Set the process's thread count and deterministic kernels. They stay so after the engine is closed."""
    torch.set_num_threads(recipe.threads_per_worker)
    if recipe.threads_per_worker > 1 or recipe.device == "cuda":  # one CPU thread always adds in the same order
        torch.use_deterministic_algorithms(True)
        # Filling new memory costs time, and nothing reads it before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if recipe.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
        torch.backends.cudnn.benchmark = False  # it would choose kernels by their speed on the day


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`: of a tensor, of tuples, lists and dicts of them, or of what has a `to`."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if callable(getattr(batch, "to", None)):  # a tensor; transformers' BatchEncoding, say
        return batch.to(device)
    return batch
