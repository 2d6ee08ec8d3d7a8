"""Training steps on a real GPU, recorded from the allocator's own history."""
