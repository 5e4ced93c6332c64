"""Checkpoints and snapshots: state that outlives a process."""
