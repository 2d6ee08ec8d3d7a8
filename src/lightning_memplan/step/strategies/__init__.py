"""Wrap a replica as a Trainer's strategy does, in one process that stands for one of several ranks."""
