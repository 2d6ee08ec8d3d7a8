"""A training step on fake tensors, recorded as events."""
