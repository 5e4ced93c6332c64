"""Predictions about a run."""
