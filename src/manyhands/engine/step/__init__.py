"""The parts of a step up to the sums of gradients."""
