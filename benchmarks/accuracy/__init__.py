"""Compare predictions with measurements: ``python -m benchmarks.accuracy.nullgpu``."""
