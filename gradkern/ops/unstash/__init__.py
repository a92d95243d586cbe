"""Gradients taken out of their 8-bit blocks again, scaled."""
