"""Documents that users write."""
