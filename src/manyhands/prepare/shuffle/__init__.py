"""Shuffles: one stage sorts records into runs (map side), the next stage merges ranges of keys (reduce side)."""
