"""What a CPU needs to be fast: C++ kernels built by the machine's own compiler, and memory that is kept."""
