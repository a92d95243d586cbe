"""The rule of Lion: meaning, specification, Triton kernel, samples."""
