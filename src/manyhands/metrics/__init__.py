"""Metrics of evaluations, which give the same figures for any number of workers."""

from manyhands.metrics.classification import accuracy, auroc, confusion, f1, precision, recall, top_k
from manyhands.metrics.collected import collected
from manyhands.metrics.means import bits_per_byte, mean_absolute_error, mean_squared_error, perplexity
from manyhands.metrics.metric import Measured, Metric
from manyhands.metrics.torchmetric import torchmetric

__all__ = [
    "Measured",
    "Metric",
    "accuracy",
    "auroc",
    "bits_per_byte",
    "collected",
    "confusion",
    "f1",
    "mean_absolute_error",
    "mean_squared_error",
    "perplexity",
    "precision",
    "recall",
    "top_k",
    "torchmetric",
]
