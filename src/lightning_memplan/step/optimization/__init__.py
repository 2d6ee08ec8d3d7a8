"""Train on a batch: with automatic optimization, with manual optimization, or a module without hooks."""
