"""Suite ``step``: the bare optimizer step, no clipping, against torch's own implementations and the triad."""

from __future__ import annotations

import torch

import gradkern as gk

from .cases import CASES
from .harness import Report, Triad, interleave
from .systems import Replica

__all__ = ["run"]

BYTES_PER_PARAM = 28  # read p, g, m, v and write p, m, v in fp32


def run(report: Report, rounds: int) -> None:
    """Time every case."""
    for case, shapes in CASES.items():
        replicas = {name: Replica(shapes(), report.device) for name in ("gradkern", "torch fused", "torch foreach")}
        systems = {
            "gradkern": gk.AdamW(replicas["gradkern"].params, lr=1e-4).step,
            "torch fused": torch.optim.AdamW(replicas["torch fused"].params, lr=1e-4, fused=True).step,
            "torch foreach": torch.optim.AdamW(replicas["torch foreach"].params, lr=1e-4, foreach=True).step,
        }
        triad = Triad(report.device)
        timings = interleave({**systems, **triad.systems()}, report.device, rounds=rounds)
        report.add_times(case, "step", timings, systems)
        for other in ("torch fused", "torch foreach"):
            report.add_ratio(case, "speedup", timings, other, "gradkern")
        moved = BYTES_PER_PARAM * replicas["gradkern"].numel
        bandwidth = moved / min(timings["gradkern"])
        report.add(case, "gradkern", "bandwidth", bandwidth / 1e9, "GB/s")
        report.add(case, "triad", "bandwidth", triad.bandwidth(timings) / 1e9, "GB/s")
        report.add(case, "gradkern", "share_of_triad", 100 * bandwidth / triad.bandwidth(timings), "%")
