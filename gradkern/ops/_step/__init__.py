"""What every optimizer step shares: codecs, random words, the reference and the Triton kernel around a rule."""
