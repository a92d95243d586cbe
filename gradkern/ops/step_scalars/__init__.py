"""The block of scalars of one step: exact norm, clip coefficient, gradient multiplier, skip flag."""
