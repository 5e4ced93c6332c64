"""The samples that a run reads."""
