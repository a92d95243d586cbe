"""How parameters and optimizer state are stored, and what fp32 numbers that means: the reference of every codec.

A rule computes in fp32. A codec turns what lies in memory into fp32 and back; codes are shared with ``csrc``.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from gradkern.ops._step.random import next_words, random_words, stir

__all__ = [
    "STATE_BLOCK",
    "GradTransform",
    "ParamCodec",
    "StateCodec",
    "decode_param",
    "decode_state",
    "encode_param",
    "encode_state",
    "param_dtypes",
    "state_blocks",
    "state_dtype",
    "stirred_bits",
]

STATE_BLOCK = 64
"""Elements that share one exponent in 8-bit state; ``kStateBlock`` in ``csrc/cpu/kernels.h``."""


class ParamCodec(IntEnum):
    """How a parameter is stored beside the bits that its dtype has no room for (``remainders``)."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    BFLOAT16_MASTER32 = 3  # remainder: the fp32 value itself
    FLOAT16_MASTER32 = 4
    BFLOAT16_SPLIT16 = 5  # remainder: fp32 value minus parameter, 16 bits: exact
    BFLOAT16_SPLIT8 = 6  # remainder: the same rounded to 8 bits
    BFLOAT16_STOCHASTIC = 7  # no remainder, rounded stochastically


class StateCodec(IntEnum):
    """How optimizer state is stored."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    BFLOAT16_STOCHASTIC = 7
    BLOCK8 = 8


class GradTransform(IntEnum):
    """What is done to a gradient before the rule sees it."""

    NONE = 0
    LIMIT = 1  # cut to [-limit, limit]
    UNITS = 2  # one multiplier for every unit of consecutive elements


_PARAM_DTYPES = {
    ParamCodec.FLOAT32: (torch.float32, None),
    ParamCodec.BFLOAT16: (torch.bfloat16, None),
    ParamCodec.FLOAT16: (torch.float16, None),
    ParamCodec.BFLOAT16_MASTER32: (torch.bfloat16, torch.float32),
    ParamCodec.FLOAT16_MASTER32: (torch.float16, torch.float32),
    ParamCodec.BFLOAT16_SPLIT16: (torch.bfloat16, torch.int16),
    ParamCodec.BFLOAT16_SPLIT8: (torch.bfloat16, torch.int8),
    ParamCodec.BFLOAT16_STOCHASTIC: (torch.bfloat16, None),
}
_STATE_DTYPES = {
    StateCodec.FLOAT32: torch.float32,
    StateCodec.BFLOAT16: torch.bfloat16,
    StateCodec.FLOAT16: torch.float16,
    StateCodec.BFLOAT16_STOCHASTIC: torch.bfloat16,
    StateCodec.BLOCK8: torch.uint8,
}
_MASK = 0xFFFFFFFF
_NAN = 0x7FC00000


def param_dtypes(codec: ParamCodec) -> tuple[torch.dtype, torch.dtype | None]:
    """Dtype of the parameter and of its remainder; None where there is none."""
    return _PARAM_DTYPES[codec]


def state_dtype(codec: StateCodec) -> torch.dtype:
    """Dtype of the state tensors."""
    return _STATE_DTYPES[codec]


def state_blocks(numel: int) -> int:
    """Blocks of 8-bit state for ``numel`` elements."""
    return -(-numel // STATE_BLOCK)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Bits of fp32 values as non-negative int64, every NaN the canonical one."""
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    return torch.where(x.isnan(), _NAN, bits)


def _float(bits: torch.Tensor) -> torch.Tensor:
    """The fp32 values of bits held in int64, taken modulo 2^32."""
    bits = bits & _MASK
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _low(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The lowest bits as a signed integer of ``dtype``."""
    width = 8 * dtype.itemsize
    low = bits & ((1 << width) - 1)
    return torch.where(low >= 1 << (width - 1), low - (1 << width), low).to(dtype)


def _set_high_half(param: torch.Tensor, bits: torch.Tensor) -> None:
    param.view(torch.int16).copy_(_low(bits >> 16, torch.int16))


def decode_param(codec: ParamCodec, param: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """The fp32 values of a flat parameter, shape ``(numel,)``."""
    if remainder is None:
        return param.float()
    if codec in (ParamCodec.BFLOAT16_MASTER32, ParamCodec.FLOAT16_MASTER32):
        return remainder.clone()
    high = (param.view(torch.int16).to(torch.int64) & 0xFFFF) << 16
    shift = 0 if codec == ParamCodec.BFLOAT16_SPLIT16 else 8
    return _float(high + (remainder.to(torch.int64) << shift))


def encode_param(
    codec: ParamCodec, x: torch.Tensor, param: torch.Tensor, remainder: torch.Tensor | None, key: int
) -> None:
    """Store fp32 values in a flat parameter and its remainder.

    Without a master, values are rounded to nearest even, or stochastically. With one, the parameter is the master
    rounded to nearest, ties away from zero: then their difference always fits the remainder.
    """
    if codec == ParamCodec.BFLOAT16_STOCHASTIC:
        param.view(torch.int16).copy_(_stochastic_bf16(x, next_words(random_words(key, x.numel())) >> 16))
        return
    if remainder is None or codec == ParamCodec.FLOAT16_MASTER32:
        param.copy_(x)
        if remainder is not None:
            remainder.copy_(x)
        return
    bits = _bits(x)
    if codec == ParamCodec.BFLOAT16_MASTER32:
        remainder.copy_(x)
    elif codec == ParamCodec.BFLOAT16_SPLIT16:
        remainder.copy_(_low(bits, torch.int16))
    else:
        kept = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
        remainder.copy_(_low(kept, torch.int8))
        bits = kept << 8
    _set_high_half(param, bits + 0x8000)


def _stochastic_bf16(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """int16 bits of fp32 values rounded up with the probability of what is cut off; ``random`` has 16 bits."""
    bits = _bits(x)
    return _low(torch.where(bits == _NAN, 0x7FC0, (bits + random) >> 16), torch.int16)


def stirred_bits(x: torch.Tensor, key: int) -> torch.Tensor:
    """Random bits for all 8-bit states of an element, from the first one's fp32 value; the highest are best.

    One multiplication where a word of the counter takes two and a counter: the low bits of a fresh average are as good
    as random, and where they repeat, the key does not.
    """
    return stir(_bits(x), key)


def _block_exponents(largest: torch.Tensor, shift: int, infinity: int) -> torch.Tensor:
    """Of blocks whose largest magnitudes have these bits: the next one where that number may be rounded up to it.

    Cut at the power of two, an average that grows slowly would never pass it. Nothing finite gets that of infinity,
    which is where the numbers of the dtype end.
    """
    rounded = (largest + ((1 << shift) - 1)) >> 23
    return torch.where(rounded < infinity, rounded, largest >> 23)


def _block_base(exponents: torch.Tensor, numel: int, mantissa_bits: int) -> torch.Tensor:
    base = (exponents.to(torch.int64) - 15).clamp(min=0) << mantissa_bits
    return base.repeat_interleave(STATE_BLOCK)[:numel]


def decode_state(codec: StateCodec, state: torch.Tensor, scale: torch.Tensor | None, *, signed: bool) -> torch.Tensor:
    """The fp32 values of a flat state, shape ``(numel,)``.

    8-bit codes are relative to the exponent of the largest element of their block of 64 (``scale``, uint8), or to the
    next one where that element may be rounded up to it: 4 exponent and 3 mantissa bits for a signed state, negated as a
    whole, whose code 0 is zero; 4 and 4 for one without sign, whose code 0 is the smallest that the block can hold: the
    step divides by it.
    """
    if codec != StateCodec.BLOCK8:
        return state.float()
    assert scale is not None  # noqa: S101  (checked with the operands)
    codes = state.to(torch.int64)
    if signed:
        magnitude = torch.where(codes >= 128, 256 - codes, codes)
        bits = torch.where(magnitude == 0, 0, (magnitude + _block_base(scale, codes.numel(), 3)) << 20)
        return _float(bits | ((codes & 0x80) << 24))
    return _float((codes + _block_base(scale, codes.numel(), 4)) << 19)


def encode_state(
    codec: StateCodec,
    x: torch.Tensor,
    state: torch.Tensor,
    scale: torch.Tensor | None,
    key: int,
    *,
    signed: bool,
    half: int,
    stirred: torch.Tensor | None = None,
    infinity: int = 255,
) -> None:
    """Store fp32 values in a flat state.

    Args:
        codec: How.
        x: fp32, shape ``(numel,)``.
        state: Receives the codes.
        scale: Receives the exponents of blocks, with 8-bit codes.
        key: Of the random words.
        signed: Whether the state can be negative.
        half: Which 16 bits of an element's word are this state's, in bf16: 0 the low, 1 the high.
        stirred: Random bits of 8-bit codes, from :func:`stirred_bits` of the first state's values.
        infinity: Exponent that no block of finite numbers is given, with 8-bit codes.
    """
    if codec not in (StateCodec.BLOCK8, StateCodec.BFLOAT16_STOCHASTIC):
        state.copy_(x)
        return
    if codec == StateCodec.BFLOAT16_STOCHASTIC:
        words = random_words(key, x.numel())
        state.view(torch.int16).copy_(_stochastic_bf16(x, words & 0xFFFF if half == 0 else words >> 16))
        return
    assert scale is not None  # noqa: S101
    assert stirred is not None  # noqa: S101
    bits = _bits(x)
    magnitude = bits & 0x7FFFFFFF
    numel = x.numel()
    padded = magnitude.new_zeros(scale.numel() * STATE_BLOCK)
    padded[:numel] = magnitude
    mantissa_bits = 3 if signed else 4
    shift = 23 - mantissa_bits
    exponents = _block_exponents(padded.view(-1, STATE_BLOCK).amax(1) if numel else padded, shift, infinity)
    scale.copy_(exponents.to(torch.uint8))
    random = stirred >> (32 - shift)
    code = ((magnitude + random) >> shift) - _block_base(exponents, numel, mantissa_bits)
    if signed:
        code = torch.where(bits >= 1 << 31, -code.clamp(min=0), code.clamp(min=0)).clamp(-128, 127) & 0xFF
    state.copy_(code.clamp(0, 255).to(torch.uint8))
