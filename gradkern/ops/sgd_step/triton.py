"""The rule of SGD in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from gradkern.ops._step.triton import step_launcher, step_variants
from gradkern.ops.sgd_step.spec import STEP

__all__ = ["VARIANTS", "step_"]


@triton.jit
def sgd_scalars(hyper_ptr, multiplier, step, VARIANT: tl.constexpr):
    """Scalars of a step, formed in fp64; the first has no dampening."""
    lr = tl.load(hyper_ptr)
    momentum = tl.load(hyper_ptr + 1)
    first = step <= 1
    old_weight = tl.where(first, momentum * 0.0, momentum)
    grad_weight = tl.where(first, momentum * 0.0 + 1.0, 1.0 - tl.load(hyper_ptr + 2))
    lr = lr.to(tl.float32)
    return (
        (multiplier * tl.load(hyper_ptr + 4)).to(tl.float32),
        tl.load(hyper_ptr + 3).to(tl.float32),
        old_weight.to(tl.float32),
        grad_weight.to(tl.float32),
        momentum.to(tl.float32),
        lr,
        lr,
        lr,
    )


@triton.jit
def sgd_rule(
    p, g, buffer, s1, s2, grad_multiplier, weight_decay, old_weight, grad_weight, momentum, lr, c6, c7,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """The new parameter and momentum buffer."""
    g = g * grad_multiplier + p * weight_decay
    if VARIANT & 1:
        buffer = buffer * old_weight + g * grad_weight
        if VARIANT & 2:
            g = g + buffer * momentum
        else:
            g = buffer
    return p - g * lr, buffer, s1, s2


step_ = step_launcher(STEP.rule, sgd_scalars, sgd_rule)
VARIANTS = step_variants(STEP.rule, sgd_scalars, sgd_rule)
