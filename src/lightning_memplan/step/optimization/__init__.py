"""What happens between a batch and the optimizer step: by Lightning, by hand, or without hooks."""
