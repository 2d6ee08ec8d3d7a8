"""GPUs of this machine and of the catalogue, and the host."""
