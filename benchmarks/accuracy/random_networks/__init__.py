"""Random networks, predicted and trained on the null GPU: see ``__main__.py``."""
