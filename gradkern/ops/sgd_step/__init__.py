"""The rule of SGD: meaning, specification, Triton kernel, samples."""
