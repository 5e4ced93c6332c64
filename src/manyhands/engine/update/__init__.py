"""From sums of gradients to new weights."""
