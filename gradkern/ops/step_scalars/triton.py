"""Triton kernel of ``step_scalars_``: one program, no host read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gradkern.ops._triton.launch import Variant, warp_size

__all__ = ["VARIANTS", "step_scalars_"]

_LIMBS = tl.constexpr(22)
_WORDS = tl.constexpr(32)  # limbs padded to a power of two
_BLOCK = tl.constexpr(64)


@triton.jit
def _step_scalars_kernel(
    scalars_ptr,
    blocks_ptr,
    hyper_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    partial_blocks,
    step_blocks,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
):
    words = tl.arange(0, _WORDS)
    limbs = tl.zeros([_WORDS], tl.int64)
    nans = tl.zeros([], tl.int64)
    infs = tl.zeros([], tl.int64)
    for block in range(partial_blocks):
        values_ptr = tl.load(blocks_ptr + block * 2).to(tl.pointer_type(tl.int64))
        size = tl.load(blocks_ptr + block * 2 + 1)
        for start in range(0, size, _BLOCK):
            offsets = start + tl.arange(0, _BLOCK)
            bits = tl.load(values_ptr + offsets, mask=offsets < size, other=0)
            exponent = (bits >> 52) & 0x7FF
            fraction = bits & 0xFFFFFFFFFFFFF
            position = exponent - 723  # 1075 - 352: the lowest bit of 2^-300 stands at 0
            nan = (exponent == 0x7FF) & (fraction != 0)
            nans += tl.sum(nan.to(tl.int64))
            infs += tl.sum((position > 607).to(tl.int64))  # 607: the largest that three of 22 limbs hold
            counted = (position >= 0) & (position <= 607)
            mantissa = tl.where(counted, fraction | 0x10000000000000, 0)
            position = tl.where(counted, position, 0)
            limb = (position >> 5)[:, None]
            shift = position & 31
            low = (mantissa & 0xFFFFFFFF) << shift
            high = (mantissa >> 32) << shift
            first = (low & 0xFFFFFFFF)[:, None]
            second = ((low >> 32) + (high & 0xFFFFFFFF))[:, None]
            third = (high >> 32)[:, None]
            spread = tl.where(limb == words[None, :], first, 0)
            spread += tl.where(limb + 1 == words[None, :], second, 0)
            spread += tl.where(limb + 2 == words[None, :], third, 0)
            limbs += tl.sum(spread, axis=0)
    total = tl.load(hyper_ptr) * 0.0  # an fp64 zero
    weight = tl.load(hyper_ptr + 1)  # 2^-352
    carry = tl.zeros([], tl.int64)
    for k in range(_LIMBS):
        word = tl.sum(tl.where(words == k, limbs, 0)) + carry
        total = total + (word & 0xFFFFFFFF).to(tl.float64) * weight
        carry = word >> 32
        weight = weight * 4294967296.0
    total = tl.where(infs > 0, float("inf"), total)
    total = tl.where(nans > 0, float("nan"), total)

    norm = tl.sqrt(total)
    scale = tl.load(hyper_ptr + 2)
    if HAS_SCALE:
        scale = tl.load(grad_scale_ptr).to(tl.float64)
    norm = norm / scale
    max_norm = tl.load(hyper_ptr + 3)
    clip = max_norm / (norm + tl.load(hyper_ptr + 4))
    clip = tl.where(clip > 1.0, 1.0, clip)
    clip = tl.where(max_norm == float("inf"), 1.0, clip)
    skip = tl.zeros([], tl.int32)
    if HAS_FOUND_INF:
        skip = (tl.load(found_inf_ptr) != 0).to(tl.int32)
    tl.store(scalars_ptr, norm)
    tl.store(scalars_ptr + 1, (clip / scale).to(tl.float32).to(tl.float64))
    tl.store(scalars_ptr + 2, skip.to(tl.float64))
    tl.store(scalars_ptr + 3, clip)
    for block in range(partial_blocks, partial_blocks + step_blocks):
        steps_ptr = tl.load(blocks_ptr + block * 2).to(tl.pointer_type(tl.float32))
        size = tl.load(blocks_ptr + block * 2 + 1)
        for start in range(0, size, _BLOCK):
            offsets = start + tl.arange(0, _BLOCK)
            step = tl.load(steps_ptr + offsets, mask=offsets < size, other=0.0)
            tl.store(steps_ptr + offsets, step + tl.where(skip != 0, 0.0, 1.0), mask=offsets < size)


def step_scalars_(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """Launch the one program; same contract as the reference."""
    rows = [(block.data_ptr(), block.numel()) for block in (*partials, *steps)]
    blocks = torch.tensor(rows or [(0, 0)], dtype=torch.int64)
    # Constants travel as fp64 because Triton narrows Python floats to fp32.
    hyper = torch.tensor([0.0, 2.0**-352, 1.0, max_norm, 1e-6], dtype=torch.float64)
    if scalars.device.type != "cpu":
        blocks = blocks.pin_memory().to(scalars.device, non_blocking=True)
        hyper = hyper.pin_memory().to(scalars.device, non_blocking=True)
    _step_scalars_kernel[(1,)](
        scalars,
        blocks,
        hyper,
        hyper if grad_scale is None else grad_scale,
        hyper if found_inf is None else found_inf,
        len(partials),
        len(steps),
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND_INF=found_inf is not None,
        enable_fp_fusion=False,
        num_warps=256 // warp_size(),
    )


VARIANTS = [
    Variant(
        _step_scalars_kernel,
        {
            "scalars_ptr": "*fp64",
            "blocks_ptr": "*i64",
            "hyper_ptr": "*fp64",
            "grad_scale_ptr": "*fp32",
            "found_inf_ptr": "*fp32",
            "partial_blocks": "i32",
            "step_blocks": "i32",
        },
        {"HAS_SCALE": True, "HAS_FOUND_INF": True},
        item_bytes=0,
        hot_bytes=0,
    )
]
