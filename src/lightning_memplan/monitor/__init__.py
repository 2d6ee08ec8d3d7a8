"""Measure training steps against their predictions, and remember runs."""
