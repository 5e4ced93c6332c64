"""From a Dataset to stages."""
