"""The reference against fp64 truth: what the bits of every backend mean."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import gradkern as gk
from gradkern import functional
from gradkern.ops._registry import SPECS
from gradkern.ops._table import Operands
from gradkern.ops.adamw_step import spec as adamw_step
from gradkern.ops.adamw_step.reference import AMSGRAD, COUPLED
from gradkern.ops.lion_step import spec as lion_step
from gradkern.ops.sgd_step import spec as sgd_step
from gradkern.ops.sgd_step.reference import NESTEROV
from gradkern.ops.step_scalars.reference import NORM, SKIP, SKIPPED, power
from gradkern.testing import random_values, same_bits


def step_scalars(multiplier: float) -> torch.Tensor:
    scalars = functional.new_scalars(torch.device("cpu"))
    scalars[1] = multiplier
    return scalars


def state(n, dtype, seed, *, signed):
    x = random_values(n, dtype, seed=seed)
    return x if signed else x.abs() + 0.1


def adamw_truth(p, g, states, t, variant, lr, beta1, beta2, eps, weight_decay):
    m, v, *largest = states
    g = g + weight_decay * p if variant & COUPLED else g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    top = torch.maximum(largest[0], v) if variant & AMSGRAD else v
    denom = top.sqrt() / math.sqrt(1 - beta2**t) + eps
    p = p if variant & COUPLED else p * (1 - lr * weight_decay)
    return p - lr / (1 - beta1**t) * m / denom, (m, v, top)[: len(states)]


def sgd_truth(p, g, states, t, variant, lr, momentum, dampening, weight_decay):
    g = g + weight_decay * p
    if states:
        buffer = momentum * states[0] + (1 - dampening) * g
        states, g = (buffer,), g + momentum * buffer if variant & NESTEROV else buffer
    return p - lr * g, states


def lion_truth(p, g, states, t, variant, lr, beta1, beta2, weight_decay):
    m = states[0]
    update = (beta1 * m + (1 - beta1) * g).sign()
    return p * (1 - lr * weight_decay) - lr * update, (beta2 * m + (1 - beta2) * g,)


RULES = {
    "adamw_step_": (adamw_step.STEP, adamw_truth),
    "sgd_step_": (sgd_step.STEP, sgd_truth),
    "lion_step_": (lion_step.STEP, lion_truth),
}
VARIANTS = [(name, variant) for name, (op, _) in RULES.items() for variant in op.rule.variants]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_step_is_the_rule_up_to_rounding(name, variant, dtype, sign):
    op, truth = RULES[name]
    rule = op.rule
    n, t, multiplier = 5000, 7, torch.tensor(0.37).item()
    p, g = random_values(n, dtype, seed=0), random_values(n, dtype, seed=1)
    present = rule.variant_states(variant)
    states = [state(n, dtype, k + 2, signed=s.signed) for k, s in enumerate(present)]
    numbers = rule.sample_hyper[:-1]
    expected = truth(p.double(), g.double() * multiplier * sign, [s.double() for s in states], t, variant, *numbers)
    tensors = {"params": [p], "grads": [g], "steps": [torch.tensor(float(t))]}
    tensors |= {f"{s.name}s": [tensor] for s, tensor in zip(present, states, strict=True)}
    hyper = torch.tensor([*numbers, sign, 0.0], dtype=torch.float64)
    with gk.use_backend("reference"):
        functional.step_(op, tensors, step_scalars(multiplier), hyper, variant=variant)
    # Half an ulp of the stored dtype, and at most a dozen fp32 roundings on the way of terms of size about 4.
    stored, steps = torch.finfo(dtype).eps / 2, 12 * torch.finfo(torch.float32).eps
    for got, exact in zip((p, *states), (expected[0], *expected[1]), strict=True):
        error = (got.double() - exact).abs()
        assert bool((error <= exact.abs() * stored + 4 * steps).all()), error.max()


def test_rules_are_all_covered():
    assert {name for name in SPECS if name.endswith("_step_")} == RULES.keys()


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
    assert scalars[:4].tolist() == [norm, torch.tensor(clip / scale, dtype=torch.float64).float().item(), 0.0, clip]
    assert steps[0].item() == 5.0


def test_skip_counts_no_step_and_moves_nothing():
    scalars = functional.new_scalars(torch.device("cpu"))
    step = torch.tensor(4.0)
    for skipped in (1.0, 2.0):
        functional.step_scalars_(scalars, [step], [], found_inf=torch.tensor(1.0))
        assert step.item() == 4.0
        assert scalars[SKIPPED].item() == skipped
    p = torch.ones(3)
    tensors = {name: [torch.ones(3)] for name in ("grads", "exp_avgs", "exp_avg_sqs")}
    hyper = torch.tensor([*adamw_step.STEP.rule.sample_hyper, 0.0], dtype=torch.float64)
    functional.step_(adamw_step.STEP, {"params": [p], "steps": [step], **tensors}, scalars, hyper)
    assert p.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_skips_only_where_asked_for(bad):
    for wanted in (False, True):
        scalars = functional.new_scalars(torch.device("cpu"))
        step = torch.tensor(4.0)
        grads = Operands("test", {"grads": [torch.tensor([1.0, bad])]})
        functional.step_scalars_(scalars, [step], [], grads=grads, skip_nonfinite=wanted)
        assert scalars[SKIP].item() == scalars[SKIPPED].item() == float(wanted)
        assert step.item() == (4.0 if wanted else 5.0)


@pytest.mark.parametrize("backend", ["reference", None])
def test_what_is_summed_here_is_what_sumsq_sums(backend):
    fp32 = [random_values(n, torch.float32, seed=n) for n in (1, 5000, 0)]
    bf16 = [random_values(n, torch.bfloat16, seed=n) for n in (9000, 3)]
    known = functional.sumsq([random_values(100, torch.float32)])
    partials = [functional.sumsq(fp32), functional.sumsq(bf16)]
    expected, scalars = (functional.new_scalars(torch.device("cpu")) for _ in range(2))
    functional.step_scalars_(expected, [], [known, *partials])
    tables = [Operands("test", {"others": fp32, "grads": fp32}), Operands("test", {"grads": bf16})]
    given = torch.full((4,), -1.0, dtype=torch.float64)
    with contextlib.nullcontext() if backend is None else gk.use_backend(backend):
        sums = functional.step_scalars_(scalars, [], [known], grads=tables)
        functional.step_scalars_(functional.new_scalars(given.device), [], [], grads=tables[1], grad_partials=[given])
    assert all(map(same_bits, [scalars, *sums, given], [expected, *partials, partials[1]]))
    assert scalars[NORM] > 0
