"""Listeners: they write the metrics of a run to a terminal, to its run directory, and to TensorBoard."""
