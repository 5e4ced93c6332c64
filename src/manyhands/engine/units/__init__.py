"""Units: parameters that travel together."""
