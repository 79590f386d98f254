"""Benchmarks and the experiments of the paper: data, the main training job, comparisons."""
