"""Codecs of parameters and state as Triton device functions; the meaning is in ``codecs.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from gradkern.ops._triton.kernels import load_f32, store_f32, typed_pointer

__all__ = [
    "block_exponents",
    "load_param",
    "load_state",
    "param_pointer",
    "random_words",
    "remainder_pointer",
    "state_pointer",
    "step_key",
    "stirred_bits",
    "store_param",
    "store_state",
]

# Parameter codecs.
_FLOAT32 = tl.constexpr(0)
_BFLOAT16 = tl.constexpr(1)
_FLOAT16 = tl.constexpr(2)
_MASTER32 = tl.constexpr(3)
_FLOAT16_MASTER32 = tl.constexpr(4)
_SPLIT16 = tl.constexpr(5)
_SPLIT8 = tl.constexpr(6)
_STOCHASTIC = tl.constexpr(7)
_BLOCK8 = tl.constexpr(8)

_STATE_BLOCK = tl.constexpr(64)


@triton.jit
def param_pointer(address, CODEC: tl.constexpr, ALIGNED: tl.constexpr):
    """bf16 is handled as its bits."""
    return typed_pointer(address, _FLOAT16 if CODEC == _FLOAT16_MASTER32 else CODEC, ALIGNED)


@triton.jit
def remainder_pointer(address, CODEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Of what the parameter's dtype has no room for."""
    if CODEC == _SPLIT8:
        pointer = _byte_pointer(address, tl.int8, ALIGNED)
    else:
        pointer = typed_pointer(address, _BFLOAT16 if CODEC == _SPLIT16 else _FLOAT32, ALIGNED)
    return pointer


@triton.jit
def state_pointer(address, CODEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Of optimizer state."""
    return _byte_pointer(address, tl.uint8, ALIGNED) if CODEC == _BLOCK8 else typed_pointer(address, CODEC, ALIGNED)


@triton.jit
def _byte_pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def step_key(seed_ptr, step, param_id, offset):
    """Key of the random words of one chunk."""
    seed = tl.load(seed_ptr).to(tl.int64)
    key = _mixed((seed & 0xFFFFFFFF).to(tl.uint32))
    key = _mixed(key ^ (seed >> 32).to(tl.uint32))
    key = _mixed(key ^ step.to(tl.uint32))
    key = _mixed(key ^ (param_id & 0xFFFFFFFF).to(tl.uint32))
    return _mixed(key ^ (offset >> 32).to(tl.uint32))


@triton.jit
def random_words(key, offsets):
    """Words of elements of a tensor, by their offset in it."""
    return _mixed((offsets & 0xFFFFFFFF).to(tl.uint32) ^ key)


@triton.jit
def _bits(x):
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)


@triton.jit
def _store(pointer, offsets, y, size, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, y, mask=offsets < size)
    else:
        tl.store(pointer + offsets, y)


@triton.jit
def _load(pointer, offsets, size, MASKED: tl.constexpr):
    return tl.load(pointer + offsets, mask=offsets < size, other=0) if MASKED else tl.load(pointer + offsets)


@triton.jit
def stirred_bits(x, key):
    """Random bits for all 8-bit states of an element, from the first one's value."""
    return (_bits(x) ^ key) * 0x21F0AAAD


@triton.jit
def _half(bits):
    return bits.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _stochastic_half(x, random):
    bits = _bits(x)
    return _half(tl.where(x == x, (bits + random) >> 16, 0x7FC0))


@triton.jit
def load_param(pointer, remainder, offsets, size, CODEC: tl.constexpr, MASKED: tl.constexpr):
    """fp32 values of a parameter."""
    if (CODEC == _MASTER32) | (CODEC == _FLOAT16_MASTER32):
        x = _load(remainder, offsets, size, MASKED)
    elif (CODEC == _SPLIT16) | (CODEC == _SPLIT8):
        high = _load(pointer, offsets, size, MASKED).to(tl.int32) << 16
        low = _load(remainder, offsets, size, MASKED).to(tl.int32)
        if CODEC == _SPLIT8:
            low = low << 8
        x = (high + low).to(tl.float32, bitcast=True)
    elif CODEC == _STOCHASTIC:
        x = load_f32(pointer, offsets, size, _BFLOAT16, MASKED)
    else:
        x = load_f32(pointer, offsets, size, CODEC, MASKED)
    return x


@triton.jit
def store_param(pointer, remainder, offsets, x, size, words, CODEC: tl.constexpr, MASKED: tl.constexpr):
    """Store fp32 values in a parameter and its remainder."""
    if CODEC == _STOCHASTIC:
        random = _mixed(words + 0x9E3779B9) >> 16
        _store(pointer, offsets, _stochastic_half(x, random), size, MASKED)
    elif CODEC == _FLOAT16_MASTER32:
        _store(remainder, offsets, x, size, MASKED)
        _store(pointer, offsets, x.to(tl.float16), size, MASKED)
    elif (CODEC == _MASTER32) | (CODEC == _SPLIT16) | (CODEC == _SPLIT8):
        bits = _bits(x)
        if CODEC == _MASTER32:
            _store(remainder, offsets, x, size, MASKED)
        elif CODEC == _SPLIT16:
            _store(remainder, offsets, _half(bits), size, MASKED)
        else:
            kept = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
            _store(remainder, offsets, kept.to(tl.uint8).to(tl.int8, bitcast=True), size, MASKED)
            bits = kept << 8
        _store(pointer, offsets, _half((bits + 0x8000) >> 16), size, MASKED)
    else:
        store_f32(pointer, offsets, x, size, CODEC, MASKED)


@triton.jit
def _spread(values, BLOCK: tl.constexpr):
    """One value for each of the 64 elements of its block."""
    blocks: tl.constexpr = BLOCK // _STATE_BLOCK
    return tl.reshape(tl.broadcast_to(values[:, None], [blocks, _STATE_BLOCK]), [BLOCK])


@triton.jit
def block_exponents(largest, SHIFT: tl.constexpr, INFINITY: tl.constexpr):
    """Exponents of blocks by the bits of their largest magnitudes; as ``_block_exponents`` of the reference."""
    rounded = (largest + ((1 << SHIFT) - 1)) >> 23
    return tl.where(rounded < INFINITY, rounded, largest >> 23)


@triton.jit
def _block_base(exponents, MANTISSA_BITS: tl.constexpr, BLOCK: tl.constexpr):
    exponents = exponents.to(tl.int32)
    return _spread(tl.where(exponents < 15, 0, exponents - 15) << MANTISSA_BITS, BLOCK)


@triton.jit
def load_state(
    pointer, scale, start, offsets, size,
    CODEC: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """fp32 values of a state."""
    if CODEC == _BLOCK8:
        code = _load(pointer, offsets, size, MASKED).to(tl.int32)
        blocks: tl.constexpr = BLOCK // _STATE_BLOCK
        block = start // _STATE_BLOCK + tl.arange(0, blocks)
        exponents = tl.load(scale + block, mask=block < (size + _STATE_BLOCK - 1) // _STATE_BLOCK, other=0)
        if SIGNED:
            magnitude = tl.where(code >= 128, 256 - code, code)
            bits = tl.where(magnitude == 0, 0, (magnitude + _block_base(exponents, 3, BLOCK)) << 20)
            bits = bits | ((code & 0x80) << 24)
        else:
            bits = (code + _block_base(exponents, 4, BLOCK)) << 19
        x = bits.to(tl.float32, bitcast=True)
    elif CODEC == _STOCHASTIC:
        x = load_f32(pointer, offsets, size, _BFLOAT16, MASKED)
    else:
        x = load_f32(pointer, offsets, size, CODEC, MASKED)
    return x


@triton.jit
def store_state(
    pointer, scale, start, offsets, x, size, stirred, random,
    CODEC: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store fp32 values of a state; ``random`` has 16 bits for each, for bf16; ``stirred`` is for 8-bit codes."""
    if CODEC == _BLOCK8:
        bits = _bits(x)
        magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
        if MASKED:
            magnitude = tl.where(offsets < size, magnitude, 0)  # padding must not set the exponent of a block
        blocks: tl.constexpr = BLOCK // _STATE_BLOCK
        largest = tl.max(tl.reshape(magnitude, [blocks, _STATE_BLOCK]), axis=1)
        exponents = block_exponents(largest, 20 if SIGNED else 19, 255)
        block = start // _STATE_BLOCK + tl.arange(0, blocks)
        # Always masked, so that the reader of machine code does not take one byte for 64 elements for a hot access.
        tl.store(scale + block, exponents.to(tl.uint8), mask=block < (size + _STATE_BLOCK - 1) // _STATE_BLOCK)
        if SIGNED:
            code = ((magnitude + (stirred >> 12).to(tl.int32)) >> 20) - _block_base(exponents, 3, BLOCK)
            code = tl.maximum(code, 0)
            code = tl.minimum(tl.where(bits >= 0x80000000, -code, code), 127) & 0xFF
        else:
            code = ((magnitude + (stirred >> 13).to(tl.int32)) >> 19) - _block_base(exponents, 4, BLOCK)
            code = tl.minimum(tl.maximum(code, 0), 255)
        _store(pointer, offsets, code.to(tl.uint8), size, MASKED)
    elif CODEC == _STOCHASTIC:
        _store(pointer, offsets, _stochastic_half(x, random), size, MASKED)
    else:
        store_f32(pointer, offsets, x, size, CODEC, MASKED)
