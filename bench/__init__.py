"""Benchmarks: systems interleaved in one process, bandwidth measured in the same run."""
