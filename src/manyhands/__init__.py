"""Manyhands: one PyTorch model, many workers, the same bits."""
