"""Pure functions that decide the bits of a result."""
