"""Reference of ``adamw_step_``: the rule in eager tensor operations, one IEEE rounding each.

Decoupled weight decay: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2. ``add(alpha=)``, ``lerp``, ``addcmul`` and
division by a Python scalar round differently between code paths of torch and are not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gradkern.ops._chunks import flat_view
from gradkern.ops._table import Operands
from gradkern.ops.step_scalars import reference as step_scalars
from gradkern.ops.step_scalars.reference import power, round_fp32

__all__ = ["AdamWHyper", "AdamWScalars", "adamw_scalars", "adamw_step_"]


class AdamWHyper(NamedTuple):
    """Hyper-parameters of one step, as the user gave them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False


@dataclass(frozen=True, slots=True)
class AdamWScalars:
    """Scalars of one step for one tensor, formed in fp64 and rounded once to fp32."""

    grad_multiplier: float
    decay: float
    grad_weight: float
    beta2: float
    sq_weight: float
    inv_bias2_sqrt: float
    eps: float
    step_size: float


def adamw_scalars(grad_multiplier: float, step: int, hyper: AdamWHyper) -> AdamWScalars:
    """The scalars of step number ``step`` (1 for the first)."""
    lr, beta1, beta2, eps, weight_decay, maximize = hyper
    bias1 = 1.0 - power(beta1, step)
    bias2 = 1.0 - power(beta2, step)
    return AdamWScalars(
        grad_multiplier=round_fp32(-grad_multiplier if maximize else grad_multiplier),
        decay=round_fp32(1.0 - lr * weight_decay),
        grad_weight=round_fp32(1.0 - beta1),
        beta2=round_fp32(beta2),
        sq_weight=round_fp32(1.0 - beta2),
        inv_bias2_sqrt=round_fp32(1.0 / math.sqrt(bias2)),
        eps=round_fp32(eps),
        step_size=round_fp32(lr / bias1),
    )


def adamw_step_(operands: Operands, scalars: torch.Tensor, hyper: AdamWHyper) -> None:
    """Update every row: ``params``, ``exp_avgs``, ``exp_avg_sqs`` and, with amsgrad, ``max_exp_avg_sqs`` in place.

    Operands of any of fp32, bf16 and fp16 are widened to fp32, updated, and rounded to nearest even on the way back.
    """
    block = scalars.tolist()
    if block[step_scalars.SKIP] != 0.0:
        return
    grad_multiplier = block[step_scalars.GRAD_MULTIPLIER]
    max_exp_avg_sqs = operands["max_exp_avg_sqs"]
    scalars_of_step: dict[float, AdamWScalars] = {}
    for i, param in enumerate(operands["params"]):
        step = float(operands["steps"][i])
        if step not in scalars_of_step:
            scalars_of_step[step] = adamw_scalars(grad_multiplier, int(step), hyper)
        s = scalars_of_step[step]
        p = flat_view(param)
        m = flat_view(operands["exp_avgs"][i])
        v = flat_view(operands["exp_avg_sqs"][i])
        g = flat_view(operands["grads"][i]).float() * s.grad_multiplier
        exp_avg = m.float()
        exp_avg = exp_avg + (g - exp_avg) * s.grad_weight
        exp_avg_sq = v.float() * s.beta2 + (g * g) * s.sq_weight
        m.copy_(exp_avg)
        v.copy_(exp_avg_sq)
        if max_exp_avg_sqs:
            largest = flat_view(max_exp_avg_sqs[i])
            exp_avg_sq = torch.maximum(largest.float(), exp_avg_sq)
            largest.copy_(exp_avg_sq)
        denom = _sqrt(exp_avg_sq) * s.inv_bias2_sqrt + s.eps
        p.copy_(p.float() * s.decay - (exp_avg / denom) * s.step_size)


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """Root of fp32 values rounded to nearest.

    ``torch.sqrt`` of fp32 may run in MKL's vector library, which is off by one ulp in about 0.6 % of elements. The fp64
    root, even off by an ulp of its own, rounds to the right fp32 value: no root of a 24-bit number lies within 2^-50 of
    a midpoint between two of them.
    """
    return x.double().sqrt().float()
