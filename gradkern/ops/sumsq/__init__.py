"""Sum of squares of a list of tensors, as one fp64 partial per chunk."""
