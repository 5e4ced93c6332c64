"""Listeners, which write the metrics of a run to the terminal, the run directory and TensorBoard."""
