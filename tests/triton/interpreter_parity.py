"""Run in its own process with TRITON_INTERPRET=1: every sample on the Triton backend against the reference.

Programs of a launch run in a shuffled order, so that no kernel may rely on the order of its programs.
"""

from __future__ import annotations

import sys

import shuffled_programs
import torch

import gradkern as gk
from gradkern import functional
from gradkern.ops._table import Operands
from gradkern.ops._triton.launch import count_launches
from gradkern.testing import all_samples, random_values, run_sample, same_bits


def _tables_of(backend: str) -> tuple[list[torch.Tensor], int]:
    """Two tables and a known block: everything written, and the launches it took."""
    tables = [
        Operands("test", {"grads": [random_values(n, dtype, seed=n) for n in (9000, 3)]})
        for dtype in (torch.float32, torch.bfloat16)
    ]
    scalars = functional.new_scalars(torch.device("cpu"))
    steps = [torch.zeros(3)]
    with gk.use_backend(backend), count_launches() as count:
        sums = functional.step_scalars_(scalars, steps, [torch.ones(2000, dtype=torch.float64)], grads=tables)
    return [scalars, *steps, *sums], count.launches


def main() -> int:
    compared, bad = 0, []
    shuffled_programs.shuffle_programs()
    for spec, sample in all_samples():
        expected = run_sample(spec, sample, "reference")
        got = run_sample(spec, sample, "triton")
        compared += 1
        if not all(map(same_bits, got, expected)):
            bad.append(f"{spec.name}: {sample.name}")
    expected, _ = _tables_of("reference")
    got, launches = _tables_of("triton")
    if not all(map(same_bits, got, expected)) or launches != 2:
        bad.append(f"step_scalars_ of two tables ({launches=})")
    if shuffled_programs.moved == 0:
        bad.append("no launch was shuffled: the interpreter walks its grid in another way now")
    print(f"compared {compared}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
