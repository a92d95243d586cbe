"""Sums of magnitudes and largest magnitudes of a list of tensors, as one fp64 partial per chunk."""
