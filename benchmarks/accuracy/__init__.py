"""How near the predictions come, measured: ``python -m benchmarks.accuracy.nullgpu``."""
