"""The reference against fp64 truth: what the bits of every backend mean."""

from __future__ import annotations

import math

import pytest
import torch

import gradkern as gk
from gradkern import functional
from gradkern.ops.step_scalars.reference import power
from gradkern.testing import random_values

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_step_is_the_rule_up_to_rounding(dtype, amsgrad, maximize):
    n, t, multiplier = 5000, 7, 0.37
    p, g, m = (random_values(n, dtype, seed=s) for s in range(3))
    v, largest = random_values(n, dtype, seed=3).abs() + 0.1, random_values(n, dtype, seed=4).abs() + 0.1
    exact = [x.double() for x in (p, g, m, v, largest)]
    scalars = torch.tensor([0.0, torch.tensor(multiplier).item(), 0.0, 0.0], dtype=torch.float64)
    with gk.use_backend("reference"):
        functional.adamw_step_(
            [p], [g], [m], [v], [largest] if amsgrad else None, [torch.tensor(float(t))], scalars,
            **{**HYPER, "maximize": maximize},
        )  # fmt: skip
    ep, eg, em, ev, el = exact
    eg = eg * (-multiplier if maximize else multiplier)
    em = HYPER["beta1"] * em + (1 - HYPER["beta1"]) * eg
    ev = HYPER["beta2"] * ev + (1 - HYPER["beta2"]) * eg * eg
    el = torch.maximum(el, ev) if amsgrad else ev
    denom = el.sqrt() / math.sqrt(1 - HYPER["beta2"] ** t) + HYPER["eps"]
    ep = ep * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] / (1 - HYPER["beta1"] ** t) * em / denom
    # Half an ulp of the stored dtype, and at most a dozen fp32 roundings on the way of terms of size about 4.
    stored, steps = torch.finfo(dtype).eps / 2, 12 * torch.finfo(torch.float32).eps
    for got, truth in ((p, ep), (m, em), (v, ev)):
        error = (got.double() - truth).abs()
        assert bool((error <= truth.abs() * stored + 4 * steps).all()), error.max()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 123_456])
@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.999, 0.999999])
def test_power_is_the_power(base, n):
    # At most 2 log2(n) roundings of relative size 2^-53, each carried n times at most by the squarings.
    assert power(base, n) == pytest.approx(base**n, rel=2 * 17 * n * 2.0**-53, abs=0.0)


@pytest.mark.parametrize("max_norm", [0.1, 1e9, math.inf])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_scalars_are_their_formulas(max_norm, scale):
    partials = torch.tensor([9.0, 16.0], dtype=torch.float64)
    scalars = functional.new_scalars(torch.device("cpu"))
    steps = [torch.tensor(4.0)]
    functional.step_scalars_(
        scalars, steps, [partials], max_norm=max_norm, grad_scale=torch.tensor(scale), found_inf=torch.tensor(0.0)
    )
    norm = 5.0 / scale
    clip = 1.0 if math.isinf(max_norm) else min(1.0, max_norm / (norm + 1e-6))
    assert scalars.tolist() == [norm, torch.tensor(clip / scale, dtype=torch.float64).float().item(), 0.0, clip]
    assert steps[0].item() == 5.0


def test_skip_counts_no_step_and_moves_nothing():
    scalars = functional.new_scalars(torch.device("cpu"))
    step = torch.tensor(4.0)
    functional.step_scalars_(scalars, [step], [], found_inf=torch.tensor(1.0))
    assert step.item() == 4.0
    p = torch.ones(3)
    functional.adamw_step_([p], [torch.ones(3)], [torch.ones(3)], [torch.ones(3)], None, [step], scalars, **HYPER)
    assert p.tolist() == [1.0, 1.0, 1.0]
