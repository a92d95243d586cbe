"""Triton kernel of ``adamw_step_``: one program a chunk; scalars formed in the kernel, no host read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, find_row, load_f32, power, store_f32, typed_pointer
from gradkern.ops._triton.launch import Variant, warp_size
from gradkern.ops.adamw_step.reference import AdamWHyper

__all__ = ["VARIANTS", "adamw_step_"]

_BLOCK = tl.constexpr(2048)
_BYTES = (4, 2, 2)  # of the dtype codes


@triton.jit
def _adamw_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, start, size,
    grad_multiplier, decay, grad_weight, beta2, sq_weight, inv_bias2_sqrt, eps, step_size,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, AMSGRAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets = start + tl.arange(0, _BLOCK)
    g = load_f32(grad_ptr, offsets, size, GRAD, MASKED) * grad_multiplier
    m = load_f32(exp_avg_ptr, offsets, size, STATE, MASKED)
    v = load_f32(exp_avg_sq_ptr, offsets, size, STATE, MASKED)
    m = m + (g - m) * grad_weight
    v = v * beta2 + (g * g) * sq_weight
    store_f32(exp_avg_ptr, offsets, m, size, STATE, MASKED)
    store_f32(exp_avg_sq_ptr, offsets, v, size, STATE, MASKED)
    if AMSGRAD:
        largest = load_f32(max_exp_avg_sq_ptr, offsets, size, STATE, MASKED)
        v = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        store_f32(max_exp_avg_sq_ptr, offsets, v, size, STATE, MASKED)
    denom = tl.sqrt_rn(v) * inv_bias2_sqrt + eps
    p = load_f32(param_ptr, offsets, size, PARAM, MASKED)
    p = p * decay - step_size * tl.div_rn(m, denom)
    store_f32(param_ptr, offsets, p, size, PARAM, MASKED)


@triton.jit
def _adamw_step_kernel(
    table_ptr,
    scalars_ptr,
    hyper_ptr,
    rows,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if tl.load(scalars_ptr + 2) != 0.0:
        return
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, 8)
    entry = table_ptr + row * 8
    offset = (chunk - tl.load(entry + 1)) * CHUNK
    size = tl.minimum(tl.load(entry) - offset, CHUNK).to(tl.int32)
    param_ptr = typed_pointer(tl.load(entry + 2), PARAM, ALIGNED) + offset
    grad_ptr = typed_pointer(tl.load(entry + 3), GRAD, ALIGNED) + offset
    exp_avg_ptr = typed_pointer(tl.load(entry + 4), STATE, ALIGNED) + offset
    exp_avg_sq_ptr = typed_pointer(tl.load(entry + 5), STATE, ALIGNED) + offset
    max_exp_avg_sq_ptr = typed_pointer(tl.load(entry + 6), STATE, ALIGNED) + offset
    step = tl.load(tl.load(entry + 7).to(tl.pointer_type(tl.float32))).to(tl.int32)

    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    bias1 = 1.0 - power(beta1, step)
    bias2 = 1.0 - power(beta2, step)
    grad_multiplier = (tl.load(scalars_ptr + 1) * tl.load(hyper_ptr + 5)).to(tl.float32)
    decay = (1.0 - lr * tl.load(hyper_ptr + 4)).to(tl.float32)
    grad_weight = (1.0 - beta1).to(tl.float32)
    sq_weight = (1.0 - beta2).to(tl.float32)
    one = beta1 * 0.0 + 1.0  # fp64
    inv_bias2_sqrt = (one / tl.sqrt(bias2)).to(tl.float32)
    eps = tl.load(hyper_ptr + 3).to(tl.float32)
    step_size = (lr / bias1).to(tl.float32)
    if size >= CHUNK:
        for start in range(0, CHUNK, _BLOCK):
            _adamw_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, start, size,
                grad_multiplier, decay, grad_weight, beta2.to(tl.float32), sq_weight, inv_bias2_sqrt, eps, step_size,
                PARAM, GRAD, STATE, AMSGRAD, False,
            )  # fmt: skip
    else:
        for start in range(0, size, _BLOCK):
            _adamw_block(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, start, size,
                grad_multiplier, decay, grad_weight, beta2.to(tl.float32), sq_weight, inv_bias2_sqrt, eps, step_size,
                PARAM, GRAD, STATE, AMSGRAD, True,
            )  # fmt: skip


def adamw_step_(operands: Operands, scalars: torch.Tensor, hyper: AdamWHyper) -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    table = cache.on_device(scalars.device)
    # Hyper-parameters travel as fp64 because Triton narrows Python floats to fp32.
    values = torch.tensor([*hyper[:-1], -1.0 if hyper.maximize else 1.0], dtype=torch.float64)
    if scalars.device.type != "cpu":
        values = values.pin_memory().to(scalars.device, non_blocking=True)
    _adamw_step_kernel[(cache.chunks,)](
        table,
        scalars,
        values,
        len(operands["params"]),
        PARAM=cache.dtype_code("params"),
        GRAD=cache.dtype_code("grads"),
        STATE=cache.dtype_code("exp_avgs"),
        AMSGRAD=bool(operands["max_exp_avg_sqs"]),
        ALIGNED=cache.aligned(),
        enable_fp_fusion=False,
        num_warps=256 // warp_size(),
    )


# Pairs of dtypes rather than their product: every codec stands on every side once.
VARIANTS = [
    Variant(
        _adamw_step_kernel,
        {"table_ptr": "*i64", "scalars_ptr": "*fp64", "hyper_ptr": "*fp64", "rows": "i32"},
        {"PARAM": param, "GRAD": grad, "STATE": state, "AMSGRAD": amsgrad, "ALIGNED": True},
        item_bytes=0,
        hot_bytes=4096 * (2 * _BYTES[param] + _BYTES[grad] + (6 if amsgrad else 4) * _BYTES[state]),
    )
    for param, grad, state, amsgrad in (
        (0, 0, 0, False),
        (0, 0, 0, True),
        (1, 0, 0, False),
        (1, 1, 1, False),
        (2, 2, 2, True),
    )
]
