"""Suite ``accumulate``: micro-batches folded into fp32 gradients: alone, with their norm, and up to the step.

And the norm of gradients that are there, by chunks and for any cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

import gradkern as gk
from gradkern import functional
from gradkern.ops._table import AddressTable

from .cases import CASES
from .harness import Report, Triad, interleave
from .systems import MAX_NORM, Replica

__all__ = ["parts", "run"]

MICRO_BATCHES = (1, 8)

System = Callable[[], object]


def run(report: Report, rounds: int) -> None:
    """Time every case."""
    for case, shapes in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            parts(report, case, shapes(), dtype, Triad(report.device), rounds)
        for count in MICRO_BATCHES:
            _cycle(report, case, shapes(), count, rounds)
        _norms(report, case, shapes(), rounds)


def parts(
    report: Report, case: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, triad: Triad, rounds: int
) -> None:
    """One micro-batch, added and overwritten, with and without the norm of the result.

    Each of our additions follows a system of torch's that ends by reading: what comes before leaves its last stores in
    the cache, and whoever comes next pays for writing them back.
    """
    replica = Replica(shapes, report.device)
    main_grads = [p.grad for p in replica.params]
    grads = [g.to(dtype, copy=True) for g in main_grads]
    partials = functional.new_partials(main_grads)
    plain, normed, first, first_normed = (AddressTable() for _ in range(4))

    def torch_add() -> None:
        for main_grad, grad in zip(main_grads, grads, strict=True):
            main_grad.add_(grad)
        nn.utils.get_total_norm(main_grads)

    def torch_foreach_add() -> None:
        torch._foreach_add_(main_grads, grads)
        nn.utils.get_total_norm(main_grads)

    adding: dict[str, System] = {
        "torch add_ + get_total_norm": torch_add,
        "gradkern": lambda: functional.accumulate_(main_grads, grads, cache=plain),
        "torch _foreach_add_ + get_total_norm": torch_foreach_add,
        "gradkern + norm": lambda: functional.accumulate_(main_grads, grads, partials, cache=normed),
    }
    overwriting: dict[str, System] = {
        "gradkern overwrite": lambda: functional.accumulate_(main_grads, grads, overwrite=True, cache=first),
        "gradkern overwrite + norm": lambda: functional.accumulate_(
            main_grads, grads, partials, overwrite=True, cache=first_normed
        ),
        "torch _foreach_copy_": lambda: torch._foreach_copy_(main_grads, grads),
    }
    timings = interleave({**adding, **overwriting, **triad.systems()}, report.device, rounds=rounds)
    name = f"accumulate_{str(dtype).removeprefix('torch.')}"
    yardstick = triad.bandwidth(timings)
    report.add(case, "triad", f"{name}_bandwidth", yardstick / 1e9, "GB/s")
    report.add_times(case, name, timings, adding)
    report.add_ratio(case, f"{name}_norm_cost", timings, "gradkern + norm", "gradkern")
    for other in ("torch add_ + get_total_norm", "torch _foreach_add_ + get_total_norm"):
        report.add_ratio(case, f"{name}_speedup", timings, other, "gradkern + norm")
    report.add_times(case, f"{name}_overwrite", timings, overwriting)
    report.add_ratio(case, f"{name}_overwrite_norm_cost", timings, "gradkern overwrite + norm", "gradkern overwrite")
    report.add_ratio(case, f"{name}_overwrite_speedup", timings, "torch _foreach_copy_", "gradkern overwrite")
    for system, bytes_per_element in (("gradkern", 8 + dtype.itemsize), ("gradkern overwrite", 4 + dtype.itemsize)):
        bandwidth = replica.numel * bytes_per_element / min(timings[system])
        report.add(case, system, f"{name}_bandwidth", bandwidth / 1e9, "GB/s")
        report.add(case, system, f"{name}_share_of_triad", 100 * bandwidth / yardstick, "%")


def _norms(report: Report, case: str, shapes: Sequence[tuple[int, ...]], rounds: int) -> None:
    """A pass for the norm: ours, ours whose bits depend on no cut at all, torch's."""
    grads = [p.grad for p in Replica(shapes, report.device).params]
    systems: dict[str, System] = {
        "gradkern": lambda: gk.get_total_norm(grads),
        "gradkern any_cut": lambda: gk.get_total_norm(grads, any_cut=True),
        "torch": lambda: nn.utils.get_total_norm(grads),
    }
    timings = interleave(systems, report.device, rounds=rounds)
    report.add_times(case, "norm", timings, systems)
    report.add_ratio(case, "norm_any_cut_cost", timings, "gradkern any_cut", "gradkern")
    report.add_ratio(case, "norm_speedup", timings, "torch", "gradkern")


def _cycle(report: Report, case: str, shapes: Sequence[tuple[int, ...]], count: int, rounds: int) -> None:
    """``count`` micro-batches in bf16 into fp32 gradients, clip, AdamW step, zero; beside every way torch has for it.

    Micro-batches alternate between two lists, since those of a training run do not stay at one address either.
    """
    ours, theirs = Replica(shapes, report.device), Replica(shapes, report.device)
    lists = [[(torch.randn_like(p) * 1e-3).bfloat16() for p in ours.params] for _ in range(2)]
    opt = gk.AdamW(ours.params, lr=1e-4, max_norm=MAX_NORM)
    opt.detach()  # gradients come from the lists, not from backward
    accumulator = gk.GradAccumulator(ours.params)
    opt.zero_grad()
    fused = torch.optim.AdamW(theirs.params, lr=1e-4, fused=True)
    buffers = [p.grad for p in theirs.params]

    def system(fold: Callable[[list[torch.Tensor], bool], object], finish: Callable[[], object]) -> System:
        turns = itertools.cycle(lists)

        def cycle() -> None:
            for i in range(count):
                fold(next(turns), i == 0)
            finish()

        return cycle

    def step_and_zero() -> None:
        opt.step()
        opt.zero_grad()

    # Nothing to zero: the first micro-batch overwrites the buffers here too.
    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(theirs.params, MAX_NORM)
        fused.step()

    def add(grads: list[torch.Tensor], first: bool) -> None:
        for buffer, grad in zip(buffers, grads, strict=True):
            buffer.copy_(grad) if first else buffer.add_(grad)

    def foreach_add(grads: list[torch.Tensor], first: bool) -> None:
        torch._foreach_copy_(buffers, grads) if first else torch._foreach_add_(buffers, grads)

    def cast_and_add(grads: list[torch.Tensor], first: bool) -> None:
        for buffer, grad in zip(buffers, grads, strict=True):
            buffer.copy_(grad) if first else buffer.add_(grad.float())

    systems = {
        "gradkern": system(lambda grads, first: accumulator.accumulate_(grads), step_and_zero),
        "torch add_ + clip + fused": system(add, clip_and_step),
        "torch _foreach_add_ + clip + fused": system(foreach_add, clip_and_step),
        "torch float() + add_ + clip + fused": system(cast_and_add, clip_and_step),
    }
    timings = interleave(systems, report.device, rounds=rounds)
    name = f"cycle_bf16_k{count}"
    report.add_times(case, name, timings, systems)
    best = min(list(systems)[1:], key=lambda other: min(timings[other]))
    report.add_ratio(case, f"{name}_speedup", timings, best, "gradkern")
