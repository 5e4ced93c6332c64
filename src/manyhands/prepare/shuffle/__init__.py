"""Shuffles: one stage writes sorted runs of records, the next reads ranges of keys."""
