"""Gradients put away in 8-bit blocks, with the sums of squares of what they were from the same pass."""
