"""Suite ``cycle``: accumulate, clip, step, zero; the parts and the whole, beside torch's best and the triad."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import gradkern as gk
from gradkern import functional
from gradkern.ops._table import AddressTable

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
            _accumulate(report, case, shapes(), dtype, rounds)
        _whole_cycle(report, case, shapes(), rounds)


def _clip_step(report: Report, case: str, shapes: list[tuple[int, ...]], rounds: int) -> None:
    systems = clip_step_systems(shapes, report.device)
    timings = interleave(systems, report.device, rounds=rounds)
    report.add_times(case, "clip_step", timings, systems)
    for other in list(systems)[1:]:
        report.add_ratio(case, "clip_step_speedup", timings, other, "gradkern")


def _accumulate(report: Report, case: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, rounds: int) -> None:
    replica = Replica(shapes, report.device)
    main_grads = [p.grad for p in replica.params]
    grads = [g.to(dtype, copy=True) for g in main_grads]
    partials = functional.new_partials(main_grads)
    plain, normed = AddressTable(), AddressTable()

    def torch_add() -> None:
        for main_grad, grad in zip(main_grads, grads, strict=True):
            main_grad.add_(grad)
        nn.utils.get_total_norm(main_grads)

    systems: dict[str, Callable[[], object]] = {
        "gradkern": lambda: functional.accumulate_(main_grads, grads, cache=plain),
        "gradkern + norm": lambda: functional.accumulate_(main_grads, grads, partials, cache=normed),
        "torch add_ + get_total_norm": torch_add,
    }
    triad = Triad(report.device)
    timings = interleave({**systems, **triad.systems()}, report.device, rounds=rounds)
    name = f"accumulate_{str(dtype).removeprefix('torch.')}"
    report.add_times(case, name, timings, systems)
    report.add_ratio(case, f"{name}_norm_cost", timings, "gradkern + norm", "gradkern")
    report.add_ratio(case, f"{name}_speedup", timings, "torch add_ + get_total_norm", "gradkern + norm")
    bandwidth = replica.numel * (8 + dtype.itemsize) / min(timings["gradkern"])
    report.add(case, "triad", f"{name}_bandwidth", triad.bandwidth(timings) / 1e9, "GB/s")
    report.add(case, "gradkern", f"{name}_bandwidth", bandwidth / 1e9, "GB/s")
    report.add(case, "gradkern", f"{name}_share_of_triad", 100 * bandwidth / triad.bandwidth(timings), "%")


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
