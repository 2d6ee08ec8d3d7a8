"""One training step on a copy of the module, in Lightning's order, without Lightning's loops."""
