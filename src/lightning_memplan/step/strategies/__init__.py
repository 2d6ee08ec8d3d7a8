"""What a Trainer's strategy wraps around a module, and its memory."""
