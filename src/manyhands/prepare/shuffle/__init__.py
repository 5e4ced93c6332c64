"""Shuffles: one stage writes sorted runs of records, and the next stage reads ranges of keys."""
