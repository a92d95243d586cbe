"""AdamW with clipping folded in: parameters and state in one pass, gradients untouched."""
