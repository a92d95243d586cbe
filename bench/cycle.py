"""Suite ``cycle``: accumulate, clip, step, zero; the parts and the whole, beside torch's best and the triad."""

from __future__ import annotations

import torch
from torch import nn

import gradkern as gk

from . import accumulate
from .cases import CASES
from .harness import Report, Triad, interleave
from .systems import MAX_NORM, Replica, clip_step_systems

__all__ = ["run"]

MICRO_BATCHES = 4


def run(report: Report, rounds: int) -> None:
    """Time every case."""
    for case, shapes in CASES.items():
        _clip_step(report, case, shapes(), rounds)
        for dtype in (torch.float32, torch.bfloat16):
            accumulate.parts(report, case, shapes(), dtype, Triad(report.device), rounds)
        _whole_cycle(report, case, shapes(), rounds)


def _clip_step(report: Report, case: str, shapes: list[tuple[int, ...]], rounds: int) -> None:
    systems = clip_step_systems(shapes, report.device)
    timings = interleave(systems, report.device, rounds=rounds)
    report.add_times(case, "clip_step", timings, systems)
    for other in list(systems)[1:]:
        report.add_ratio(case, "clip_step_speedup", timings, other, "gradkern")


def _whole_cycle(report: Report, case: str, shapes: list[tuple[int, ...]], rounds: int) -> None:
    ours, theirs = Replica(shapes, report.device), Replica(shapes, report.device)
    micro_batches = [[torch.randn_like(p) * 1e-3 for p in ours.params]] * MICRO_BATCHES
    opt = gk.AdamW(ours.params, lr=1e-4, max_norm=MAX_NORM)
    opt.detach()  # gradients come from the list below, not from backward
    accumulator = gk.GradAccumulator(ours.params)
    fused = torch.optim.AdamW(theirs.params, lr=1e-4, fused=True)

    def gradkern() -> None:
        for grads in micro_batches:
            accumulator.accumulate_(grads)
        opt.step()
        opt.zero_grad()

    buffers = [p.grad for p in theirs.params]

    def finish() -> None:
        nn.utils.clip_grad_norm_(theirs.params, MAX_NORM)
        fused.step()

    # Both sides overwrite buffers that stay: autograd would hand the first gradients over, which is free for both.
    def torch_add() -> None:
        torch._foreach_copy_(buffers, micro_batches[0])
        for grads in micro_batches[1:]:
            for buffer, grad in zip(buffers, grads, strict=True):
                buffer.add_(grad)
        finish()

    def torch_foreach() -> None:
        torch._foreach_copy_(buffers, micro_batches[0])
        for grads in micro_batches[1:]:
            torch._foreach_add_(buffers, grads)
        finish()

    systems = {
        "gradkern": gradkern,
        "torch add_ + clip + fused": torch_add,
        "torch _foreach_add_ + clip + fused": torch_foreach,
    }
    timings = interleave(systems, report.device, rounds=rounds)
    report.add_times(case, f"cycle_k{MICRO_BATCHES}", timings, systems)
    for other in list(systems)[1:]:
        report.add_ratio(case, f"cycle_k{MICRO_BATCHES}_speedup", timings, other, "gradkern")
