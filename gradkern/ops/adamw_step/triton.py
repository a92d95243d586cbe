"""The rule of AdamW and Adam in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from gradkern.ops._step.triton import step_launcher, step_variants
from gradkern.ops._triton.kernels import power
from gradkern.ops.adamw_step.spec import STEP

__all__ = ["VARIANTS", "step_"]


@triton.jit
def adamw_scalars(hyper_ptr, multiplier, step, VARIANT: tl.constexpr):
    """Scalars of a step, formed in fp64."""
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    weight_decay = tl.load(hyper_ptr + 4)
    one = beta1 * 0.0 + 1.0  # fp64
    return (
        (multiplier * tl.load(hyper_ptr + 5)).to(tl.float32),
        (weight_decay if VARIANT & 2 else 1.0 - lr * weight_decay).to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (one / tl.sqrt(1.0 - power(beta2, step))).to(tl.float32),
        tl.load(hyper_ptr + 3).to(tl.float32),
        (lr / (1.0 - power(beta1, step))).to(tl.float32),
    )


@triton.jit
def adamw_rule(
    p, g, m, v, largest, grad_multiplier, decay, grad_weight, beta2, sq_weight, inv_bias2_sqrt, eps, step_size,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """The new parameter and states."""
    g = g * grad_multiplier
    if VARIANT & 2:
        g = g + p * decay
    else:
        p = p * decay
    m = m + (g - m) * grad_weight
    v = v * beta2 + (g * g) * sq_weight
    second_moment = v
    if VARIANT & 1:
        largest = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        second_moment = largest
    denom = tl.sqrt_rn(second_moment) * inv_bias2_sqrt + eps
    p = p - step_size * tl.div_rn(m, denom)
    return p, m, v, largest


step_ = step_launcher(STEP.rule, adamw_scalars, adamw_rule)
VARIANTS = step_variants(STEP.rule, adamw_scalars, adamw_rule)
