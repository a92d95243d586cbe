"""Run in its own process with TRITON_INTERPRET=1: every sample on the Triton backend against the reference.

Programs of a launch run in a shuffled order, so that no kernel may rely on the order of its programs.
"""

from __future__ import annotations

import random
import sys

from triton.runtime import interpreter

from gradkern.testing import all_samples, run_sample, same_bits

_ORDER = random.Random(5)
_moved = 0


def _shuffle_programs() -> None:
    """GridExecutor walks its grid with range(), looked up in its module at each launch."""
    in_order = range

    def shuffled(*bounds: int) -> list[int]:
        global _moved
        programs = list(in_order(*bounds))
        _ORDER.shuffle(programs)
        _moved += programs != list(in_order(*bounds))
        return programs

    interpreter.range = shuffled


def main() -> int:
    compared, bad = 0, []
    for shuffled in (False, True):
        if shuffled:
            _shuffle_programs()
        for spec, sample in all_samples():
            expected = run_sample(spec, sample, "reference")
            got = run_sample(spec, sample, "triton")
            compared += 1
            if not all(map(same_bits, got, expected)):
                bad.append(f"{spec.name}: {sample.name} (shuffled={shuffled})")
    if _moved == 0:
        bad.append("no launch was shuffled: the interpreter walks its grid in another way now")
    print(f"compared {compared}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
