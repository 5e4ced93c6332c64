"""Listeners, which receive the figures of a run: run directory, terminal, TensorBoard, CSV, W&B, MLflow."""

from manyhands.listeners.csv_files import CSVListener
from manyhands.listeners.mlflow import MLflowListener
from manyhands.listeners.tensorboard import TensorBoardListener
from manyhands.listeners.wandb import WandbListener

__all__ = ["CSVListener", "MLflowListener", "TensorBoardListener", "WandbListener"]
