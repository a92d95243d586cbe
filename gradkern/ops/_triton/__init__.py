"""What Triton kernels share: codecs, the fold tree, the chunk search, launch helpers."""
