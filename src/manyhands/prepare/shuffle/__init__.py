"""Shuffles: sorted runs out of one stage, ranges of keys into the next."""
