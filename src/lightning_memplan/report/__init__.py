"""Results as text, tables, figures and metrics."""
