"""Run in its own process: compile every kernel variant for every target and read the machine code.

Asserted: every byte of the hot streams moves in 128-bit accesses, nothing spills to local memory, the PTX of the
rules has no fused multiply-add, approximation or flush to zero.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

import gradkern.functional  # noqa: F401  registers the ops
from gradkern.ops._registry import SPECS
from gradkern.ops._triton.launch import TARGETS, Variant, compile_ahead

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FORBIDDEN = re.compile(r"\b(?:fma[.\w]*|\w+\.approx[.\w]*|\w+\.full[.\w]*|\w+\.ftz[.\w]*)")
# Of fp32, of fp64, or a maximum of bits: addresses need none of them.
ARITHMETIC = re.compile(r"\b(?:(?:add|mul)\.(?:rn\.)?f(?:32|64)|max\.[su]32)")
# A chunk is one pass, or two of a kernel that holds more in its registers; the code has the body of that loop once.
PASSES = {"sumsq": 1, "sumsq_exact": 2, "abs_norm": 1, "accumulate_": 1, "adamw_step_": 2, "step_scalars_": 1}


def variants() -> Iterator[tuple[str, Variant]]:
    for name, spec in SPECS.items():
        for variant in importlib.import_module(spec.triton.split(":")[0]).VARIANTS:
            yield name, variant


def nvidia_problems(name: str, variant: Variant, target: object, compiled: object) -> Iterator[str]:
    ptx = compiled.asm["ptx"]
    found = set(FORBIDDEN.findall(ptx))
    if found:
        yield f"PTX has {sorted(found)}"
    if variant.hot_bytes and not ARITHMETIC.search(ptx):
        yield "PTX has no arithmetic: the reader is looking at the wrong thing"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([CUOBJDUMP, "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout + usage.stderr)
    if stack is None or int(stack[2]) != 0:
        yield f"local memory: {usage.stdout} {usage.stderr}"
    if re.search(r"\b(?:LDL|STL)\b", sass):
        yield "SASS spills to local memory"
    threads = variant.warps(target) * target.warp_size
    wide = len(re.findall(r"\b(?:LDG|STG)\.E[.\w]*\.128", sass)) * 16 * threads * PASSES[name]
    if variant.hot_bytes and wide < variant.hot_bytes:
        yield f"128-bit accesses move {wide} of {variant.hot_bytes} bytes"


def amd_problems(name: str, variant: Variant, target: object, compiled: object) -> Iterator[str]:
    code = compiled.asm["amdgcn"]
    if "scratch_" in code or not re.search(r"vgpr_spill_count: +0\b", code):
        yield "spills to scratch"
    threads = variant.warps(target) * target.warp_size
    wide = len(re.findall(r"\b(?:buffer|global)_(?:load|store)_dwordx4", code)) * 16 * threads * PASSES[name]
    if wide < variant.hot_bytes:
        yield f"128-bit accesses move {wide} of {variant.hot_bytes} bytes"


def main() -> int:
    inspected, bad = 0, []
    for name, variant in variants():
        for target in TARGETS:
            compiled = compile_ahead(variant, target)
            inspect = nvidia_problems if target.backend == "cuda" else amd_problems
            problems = list(inspect(name, variant, target, compiled))
            bad += [f"{name} {dict(variant.constants)} {target.arch}: {problem}" for problem in problems]
            inspected += 1
    print(f"inspected {inspected}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
