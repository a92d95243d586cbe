"""Micro-batch gradients folded into fp32 buffers, with the partials of the result from the same pass."""
