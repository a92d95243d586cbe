"""Triton kernels of recording; ``gradkern.rollback`` says what they compute, as it does for ``csrc/cpu``."""
