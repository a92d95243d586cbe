"""Per-sample gradients, compressed: :mod:`gradkern.rollback._reduce` says how."""
