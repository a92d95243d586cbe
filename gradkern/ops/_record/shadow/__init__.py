"""What shadows follow of a step: :mod:`gradkern.rollback._shadows` says what."""
