"""Which batch size: predicted, searched, agreed across ranks, confirmed, applied."""
