"""What a CPU needs to be fast: C++ kernels built by the machine's own compiler, memory that is kept, and threads that
do not wait awake for long."""
