"""What needs a GPU, measured in one call: `python -m benchmarks.gpu.run_all`."""
