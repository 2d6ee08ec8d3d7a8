"""CUDA's kernels: what they allocate beside their outputs, and where they differ from the CPU's."""
