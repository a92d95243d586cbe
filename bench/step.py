"""Suite ``step``: the bare optimizer step, no clipping, against torch's own implementations, peers and the triad."""

from __future__ import annotations

import torch

import gradkern as gk

from . import peers
from .cases import CASES
from .harness import Report, Triad, interleave
from .systems import Replica

__all__ = ["run"]

BYTES_PER_PARAM = 28  # read p, g, m, v and write p, m, v in fp32


def run(report: Report, rounds: int) -> None:
    """Time every case."""
    makers: dict[str, peers.Maker] = {
        "gradkern": lambda params, lr: gk.AdamW(params, lr=lr),
        "torch fused": lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
        "torch foreach": lambda params, lr: torch.optim.AdamW(params, lr=lr, foreach=True),
        **peers.usable(peers.FP32, report.device),
    }
    for case, shapes in CASES.items():
        # One set of parameters: replicas differ by where they lie in memory more than by their optimizers.
        replica = Replica(shapes(), report.device)
        systems = {name: make(replica.params, 1e-4).step for name, make in makers.items()}
        triad = Triad(report.device)
        timings = interleave({**systems, **triad.systems()}, report.device, rounds=rounds)
        report.add_times(case, "step", timings, systems)
        for other in list(systems)[1:]:
            report.add_ratio(case, "speedup", timings, other, "gradkern")
        moved = BYTES_PER_PARAM * replica.numel
        bandwidth = moved / min(timings["gradkern"])
        report.add(case, "gradkern", "bandwidth", bandwidth / 1e9, "GB/s")
        report.add(case, "triad", "bandwidth", triad.bandwidth(timings) / 1e9, "GB/s")
        report.add(case, "gradkern", "share_of_triad", 100 * bandwidth / triad.bandwidth(timings), "%")
