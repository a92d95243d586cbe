"""For tests, ours and yours: edge values, samples of every op, comparison of bit patterns."""

from __future__ import annotations

from gradkern.ops._values import SIZES, edge_values, random_values
from gradkern.testing.parity import all_samples, run_sample, same_bits

__all__ = ["SIZES", "all_samples", "edge_values", "random_values", "run_sample", "same_bits"]
