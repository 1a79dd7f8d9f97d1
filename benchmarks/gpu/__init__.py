"""What `benchmarks.gpu_run` is made of."""
