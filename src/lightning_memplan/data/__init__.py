"""The user's data: batches of any size from their own loaders and samples."""
