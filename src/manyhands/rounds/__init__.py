"""The files that islands exchange once per round, and the codec of the values in them."""
