"""The rule of Lion in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from gradkern.ops._step.triton import step_launcher, step_variants
from gradkern.ops.lion_step.spec import STEP

__all__ = ["VARIANTS", "step_"]


@triton.jit
def lion_scalars(hyper_ptr, multiplier, step, VARIANT: tl.constexpr):
    """Scalars of any step, formed in fp64."""
    lr = tl.load(hyper_ptr)
    decay = 1.0 - lr * tl.load(hyper_ptr + 3)
    lr32 = lr.to(tl.float32)
    return (
        (multiplier * tl.load(hyper_ptr + 4)).to(tl.float32),
        decay.to(tl.float32),
        (1.0 - tl.load(hyper_ptr + 1)).to(tl.float32),
        (1.0 - tl.load(hyper_ptr + 2)).to(tl.float32),
        lr32,
        lr32,
        lr32,
        lr32,
    )


@triton.jit
def lion_rule(
    p, g, m, s1, s2, grad_multiplier, decay, update_weight, state_weight, lr, c5, c6, c7, VARIANT: tl.constexpr
):  # fmt: skip
    """The new parameter and average; a NaN in the average becomes one in the parameter."""
    change = g * grad_multiplier - m
    update = m + change * update_weight
    update = tl.where(update > 0.0, 1.0, tl.where(update < 0.0, -1.0, update))
    return p * decay - update * lr, m + change * state_weight, s1, s2


step_ = step_launcher(STEP.rule, lion_scalars, lion_rule)
VARIANTS = step_variants(STEP.rule, lion_scalars, lion_rule)
