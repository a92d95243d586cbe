"""Run in its own process: compile every kernel variant for every target and read the machine code.

Asserted: every hot load and store moves 128 bits, or as many as a thread's share of a narrower stream has; nothing
spills, no local memory, at least half of a processor's threads can be resident, and the PTX of the rules, or their LLVM
code for AMD, has no fused multiply-add, approximation or flush to zero.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor

import gradkern.functional  # noqa: F401  registers the ops
from gradkern.ops._triton.launch import TARGETS
from gradkern.testing.machine_code import all_variants, problems, read, target_name, variant_name

# What has most live values does not quite fit 64 registers there: a few words spill, to the first cache. Of AdamW, a
# split8 master with 8-bit state; of recording, the step with a second moment, and on sm_80 without.
SPILLS = {
    ("adamw_step_", 6, 8, None, "sm_100"),
    ("record shadow", None, None, True, "sm_100"),
    ("record shadow", None, None, False, "sm_80"),
}


def inspect(position: int) -> list[str]:
    op, variant = list(all_variants())[position // len(TARGETS)]
    target = target_name(TARGETS[position % len(TARGETS)])
    code = read(variant, TARGETS[position % len(TARGETS)])
    found = [f"{variant_name(op, variant)} {target}: {problem}" for problem in problems(code, variant)]
    if (op, *(variant.constants.get(name) for name in ("PARAM", "STATE", "HAS_MOMENT")), target) in SPILLS and (
        variant.capped
    ):
        known = 0 < code.spill_bytes <= 32 and len(found) == 1
        return [] if known else [f"expected {variant_name(op, variant)} to spill a little and nothing else, got {code}"]
    return found


def main() -> int:
    inspected = len(list(all_variants())) * len(TARGETS)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        bad = [problem for found in pool.map(inspect, range(inspected)) for problem in found]
    print(f"inspected {inspected}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
