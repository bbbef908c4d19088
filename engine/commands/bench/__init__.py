"""`ipfm bench`: kernels, whole steps, memory, metrics."""
