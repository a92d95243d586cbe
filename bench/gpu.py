"""Suite ``gpu``: what can be known of the GPU kernels without a GPU.

Every kernel is compiled ahead of time for every target and its machine code read: registers, spills, local memory,
width of the hot accesses, occupancy. Launches are counted in Triton's interpreter. Bytes per parameter are those of the
loads and stores in the compiled step kernel. Times are **modelled** from these, for GPUs nobody ran this on: bytes over
an achievable share of the data sheet's bandwidth, plus a fixed time a launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradkern.functional  # noqa: F401  registers the ops

from .cases import CASES
from .harness import Report
from .launches import TENSORS

if TYPE_CHECKING:
    from gradkern.testing.machine_code import MachineCode

__all__ = ["BANDWIDTHS", "bytes_per_param", "count_launches", "modelled_us", "run"]

# Peak memory bandwidth in GB/s, from the vendors' data sheets.
BANDWIDTHS = {
    "A100 80GB SXM": 2039,
    "H100 SXM": 3350,
    "H200 SXM": 4800,
    "B200": 8000,
    "RTX 5090": 1792,
    "MI300X": 5300,
    "MI355X": 8000,
}
ACHIEVABLE_SHARE = 0.9
LAUNCH_US = 4.0
LAUNCHES = 2

_ROOT = Path(__file__).resolve().parents[1]
_TILE = 1024
_EXPONENT_BYTES = 2 / 64  # of 8-bit state: one byte in 64 elements, read and written, masked and so not hot


def modelled_us(bytes_moved: float, gigabytes_per_second: float) -> float:
    """Microseconds of a clipped step: a model, not a measurement."""
    return bytes_moved / (gigabytes_per_second * ACHIEVABLE_SHARE) / 1e3 + LAUNCHES * LAUNCH_US


def bytes_per_param(code: MachineCode, states_in_blocks: int) -> float:
    """Bytes that a step kernel's code moves for one element: loads and stores of a tile, and block exponents."""
    return code.hot_bytes / _TILE + states_in_blocks * _EXPONENT_BYTES


def count_launches(tensors: Sequence[int] = TENSORS) -> dict[str, int]:
    """Launches of optimizer steps, by what was stepped; a minute for 1,500 tensors in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.launches", *map(str, tensors)],
        cwd=_ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"counting launches failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(report: Report, rounds: int) -> None:
    """Compile, read, count and model; nothing is timed, so ``rounds`` has no effect."""
    del rounds
    try:
        from gradkern.ops._triton.launch import TARGETS
        from gradkern.testing.machine_code import all_variants, target_name, variant_name
    except ModuleNotFoundError as missing:
        raise SystemExit(f"suite gpu compiles Triton kernels, and {missing}; pip install triton") from None
    for case, launches in count_launches().items():
        report.add(case, "interpreter", "launches_per_step", launches, "launches")
    variants = list(all_variants())
    targets = [(position, target) for position in range(len(variants)) for target in range(len(TARGETS))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (position, target), code in zip(targets, pool.map(_read, targets), strict=True):
            op, variant = variants[position]
            case, system = variant_name(op, variant), target_name(TARGETS[target])
            report.add(case, system, "registers", code.registers, "registers")
            report.add(case, system, "spill_bytes", code.spill_bytes, "bytes")
            report.add(case, system, "local_bytes", code.local_bytes, "bytes")
            report.add(case, system, "hot_access_bits", code.hot_access_bits, "bits")
            report.add(case, system, "occupancy", code.occupancy, "of all threads")
            if "PARAM" in variant.constants:
                _add_step(report, case, system, code, variant.constants, first=target == 0)


def _read(position: tuple[int, int]) -> MachineCode:
    from gradkern.ops._triton.launch import TARGETS
    from gradkern.testing.machine_code import all_variants, read

    _, variant = list(all_variants())[position[0]]
    return read(variant, TARGETS[position[1]])


def _add_step(
    report: Report, case: str, system: str, code: MachineCode, constants: Mapping[str, Any], *, first: bool
) -> None:
    in_blocks = constants["STATES"] if constants["STATE"] == 8 else 0
    moved = bytes_per_param(code, in_blocks)
    report.add(case, system, "bytes_per_param", moved, "B")
    if not first:
        return
    norm = 4 if constants["GRAD"] == 0 else 2
    numel = sum(prod(shape) for shape in CASES["gpt2_124m"]())
    for name, bandwidth in BANDWIDTHS.items():
        time = modelled_us((moved + norm) * numel, bandwidth)
        report.add(f"{case}, GPT-2 124M clip + step", name, "modelled_us", time, "us (modelled)")
