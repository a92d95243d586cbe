"""Sum of squares of a list of tensors without a rounding, as integers."""
