"""How near the predictions come, measured: ``python -m tests.accuracy.nullgpu``."""
