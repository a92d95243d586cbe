"""Operators: one folder each, with its specification, reference, Triton kernel and samples."""
