"""Run in its own process: compile every kernel variant for every target and read the machine code.

Asserted: every hot load and store moves 128 bits, nothing spills, no local memory, at least half of a processor's
threads can be resident, and the PTX of the rules has no fused multiply-add, approximation or flush to zero.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor

import gradkern.functional  # noqa: F401  registers the ops
from gradkern.ops._triton.launch import TARGETS
from gradkern.testing.machine_code import all_variants, problems, read, target_name, variant_name


def inspect(position: int) -> list[str]:
    op, variant = list(all_variants())[position // len(TARGETS)]
    target = TARGETS[position % len(TARGETS)]
    found = problems(read(variant, target), variant)
    return [f"{variant_name(op, variant)} {target_name(target)}: {problem}" for problem in found]


def main() -> int:
    inspected = len(list(all_variants())) * len(TARGETS)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        bad = [problem for found in pool.map(inspect, range(inspected)) for problem in found]
    print(f"inspected {inspected}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
