"""Moves bytes between workers. No other package imports torch.distributed's collectives."""
