"""Results as text, tables, figures and metrics: what is analysed elsewhere is worded here."""
