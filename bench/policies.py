"""Suite ``policies``: clip + step with every clip policy, beside the plain global norm and what torch has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import gradkern as gk
from gradkern.clip import AGC, AutoClip, ClipPolicy, GlobalNorm, GroupNorm, SkipOnSpike, Value, ZClip

from .cases import CASES as _ALL
from .harness import Report, interleave
from .systems import MAX_NORM, Replica

__all__ = ["CASES", "run"]

CASES = {name: _ALL[name] for name in ("gpt2_124m", "small_1500")}
POLICIES: dict[str, Callable[[], ClipPolicy]] = {
    "GlobalNorm": lambda: GlobalNorm(MAX_NORM),
    "GroupNorm": lambda: GroupNorm(MAX_NORM),
    "Value": lambda: Value(MAX_NORM),
    "AGC": AGC,
    "ZClip": ZClip,
    "AutoClip": AutoClip,
    "SkipOnSpike": SkipOnSpike,
}


def run(report: Report, rounds: int) -> None:
    """Time every case; all policies step one set of parameters, each with its own state."""
    for case, shapes in CASES.items():
        ours, theirs = Replica(shapes(), report.device), Replica(shapes(), report.device)
        systems: dict[str, Callable[[], object]] = {
            name: gk.AdamW(ours.params, lr=1e-4, clip=make()).step for name, make in POLICIES.items()
        }
        fused = torch.optim.AdamW(theirs.params, lr=1e-4, fused=True)

        def torch_value(params: list[nn.Parameter] = theirs.params, opt: torch.optim.Optimizer = fused) -> None:
            nn.utils.clip_grad_value_(params, MAX_NORM)
            opt.step()

        systems["torch clip_grad_value_ + fused"] = torch_value
        timings = interleave(systems, report.device, rounds=rounds)
        report.add_times(case, "clip_step", timings, systems)
        for name in list(POLICIES)[1:]:
            report.add_ratio(case, "clip_step_cost", timings, name, "GlobalNorm")
        report.add_ratio(case, "clip_step_speedup", timings, "torch clip_grad_value_ + fused", "Value")
