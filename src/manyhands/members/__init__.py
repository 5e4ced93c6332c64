"""Which workers are in a group, and whether they are alive."""
