"""The Triton kernel of every step: one program a chunk, codecs around a jitted rule, no host read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._step.codecs import GradTransform, ParamCodec, StateCodec, param_dtypes, state_dtype
from gradkern.ops._step.rule import Codecs, StepRule
from gradkern.ops._step.spec import step_bytes
from gradkern.ops._step.triton_codecs import (
    load_param,
    load_state,
    param_pointer,
    random_words,
    remainder_pointer,
    state_pointer,
    step_key,
    stirred_bits,
    store_param,
    store_state,
)
from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, find_row, load_f32, typed_pointer
from gradkern.ops._triton.launch import TILE_ELEMENTS, Variant, fold_warps, launch, warp_size

__all__ = ["step_launcher", "step_variants"]

_COLUMNS = tl.constexpr(15)  # of the table, element count and first chunk included
_LIMIT = tl.constexpr(1)
_UNITS = tl.constexpr(2)
_BLOCK8 = tl.constexpr(8)


@triton.jit
def _step_block(
    param_ptr, remainder_ptr, grad_ptr, units_ptr, unit_size, unit_left,
    state0_ptr, scale0_ptr, state1_ptr, scale1_ptr, state2_ptr, scale2_ptr,
    start, size, chunk_offset, limit, key, c0, c1, c2, c3, c4, c5, c6, c7,
    RULE: tl.constexpr, VARIANT: tl.constexpr, STATES: tl.constexpr, SIGNED: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, TRANSFORM: tl.constexpr,
    RANDOM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets = start + tl.arange(0, BLOCK)
    g = load_f32(grad_ptr, offsets, size, GRAD, MASKED)
    if TRANSFORM == _LIMIT:
        g = tl.maximum(g, -limit, propagate_nan=tl.PropagateNan.ALL)
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    if TRANSFORM == _UNITS:
        unit = (offsets + unit_size - unit_left) // unit_size
        g = g * tl.load(units_ptr + unit, mask=offsets < size, other=0.0)
    s0 = g
    s1 = g
    s2 = g
    if STATES > 0:
        s0 = load_state(state0_ptr, scale0_ptr, start, offsets, size, STATE, SIGNED[0], BLOCK, MASKED)
    if STATES > 1:
        s1 = load_state(state1_ptr, scale1_ptr, start, offsets, size, STATE, SIGNED[1], BLOCK, MASKED)
    if STATES > 2:
        s2 = load_state(state2_ptr, scale2_ptr, start, offsets, size, STATE, SIGNED[2], BLOCK, MASKED)
    p = load_param(param_ptr, remainder_ptr, offsets, size, PARAM, MASKED)
    p, s0, s1, s2 = RULE(p, g, s0, s1, s2, c0, c1, c2, c3, c4, c5, c6, c7, VARIANT)
    words = random_words(key, chunk_offset + offsets) if RANDOM else offsets.to(tl.uint32)
    low = words & 0xFFFF
    high = words >> 16
    stirred = stirred_bits(s0, key) if STATE == _BLOCK8 else words
    if STATES > 0:
        store_state(state0_ptr, scale0_ptr, start, offsets, s0, size, stirred, low, STATE, SIGNED[0], BLOCK, MASKED)
    if STATES > 1:
        store_state(state1_ptr, scale1_ptr, start, offsets, s1, size, stirred, high, STATE, SIGNED[1], BLOCK, MASKED)
    if STATES > 2:
        store_state(state2_ptr, scale2_ptr, start, offsets, s2, size, stirred, high, STATE, SIGNED[2], BLOCK, MASKED)
    store_param(param_ptr, remainder_ptr, offsets, p, size, words, PARAM, MASKED)


@triton.jit
def _units_of_chunk(address, unit_size, offset, TRANSFORM: tl.constexpr):
    """The chunk's first multiplier, elements of a unit, elements that the first unit has left: 32 bits do in a chunk.

    Lengths beyond a chunk are cut to twice it, so that no element needs a division of 64 bits.
    """
    units_ptr = address.to(tl.pointer_type(tl.float32))
    size = unit_size.to(tl.uint32)
    left = size
    if TRANSFORM == _UNITS:
        first = offset // unit_size
        units_ptr += first
        size = tl.minimum(unit_size, 2 * CHUNK).to(tl.uint32)
        left = tl.minimum((first + 1) * unit_size - offset, size).to(tl.uint32)
    return units_ptr, size, left


@triton.jit
def _step_kernel(
    table_ptr,
    scalars_ptr,
    hyper_ptr,
    rows,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,
    SIGNED: tl.constexpr,
    HYPER: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if tl.load(scalars_ptr + 2) != 0.0:
        return
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, _COLUMNS)
    entry = table_ptr + row * _COLUMNS
    offset = (chunk - tl.load(entry + 1)) * CHUNK
    size = tl.minimum(tl.load(entry) - offset, CHUNK).to(tl.int32)
    param_ptr = param_pointer(tl.load(entry + 2), PARAM, ALIGNED) + offset
    remainder_ptr = remainder_pointer(tl.load(entry + 3), PARAM, ALIGNED) + offset
    grad_ptr = typed_pointer(tl.load(entry + 4), GRAD, ALIGNED) + offset
    units_ptr, unit_size, unit_left = _units_of_chunk(tl.load(entry + 5), tl.load(entry + 6), offset, TRANSFORM)
    step = tl.load(tl.load(entry + 8).to(tl.pointer_type(tl.float32))).to(tl.int32)
    state0_ptr = state_pointer(tl.load(entry + 9), STATE, ALIGNED) + offset
    scale0_ptr = tl.load(entry + 10).to(tl.pointer_type(tl.uint8)) + offset // 64
    state1_ptr = state_pointer(tl.load(entry + 11), STATE, ALIGNED) + offset
    scale1_ptr = tl.load(entry + 12).to(tl.pointer_type(tl.uint8)) + offset // 64
    state2_ptr = state_pointer(tl.load(entry + 13), STATE, ALIGNED) + offset
    scale2_ptr = tl.load(entry + 14).to(tl.pointer_type(tl.uint8)) + offset // 64

    multiplier = tl.load(scalars_ptr + 1)
    limit = tl.load(scalars_ptr + 5).to(tl.float32)
    key = step_key(hyper_ptr + HYPER, step, tl.load(entry + 7), offset) if RANDOM else tl.zeros([], tl.uint32)
    c0, c1, c2, c3, c4, c5, c6, c7 = SCALARS(hyper_ptr, multiplier, step, VARIANT)
    if size >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            _step_block(
                param_ptr, remainder_ptr, grad_ptr, units_ptr, unit_size, unit_left,
                state0_ptr, scale0_ptr, state1_ptr, scale1_ptr, state2_ptr, scale2_ptr,
                start, size, offset, limit, key, c0, c1, c2, c3, c4, c5, c6, c7,
                RULE, VARIANT, STATES, SIGNED, PARAM, GRAD, STATE, TRANSFORM, RANDOM, BLOCK, False,
            )  # fmt: skip
    else:
        for start in range(0, size, BLOCK):
            _step_block(
                param_ptr, remainder_ptr, grad_ptr, units_ptr, unit_size, unit_left,
                state0_ptr, scale0_ptr, state1_ptr, scale1_ptr, state2_ptr, scale2_ptr,
                start, size, offset, limit, key, c0, c1, c2, c3, c4, c5, c6, c7,
                RULE, VARIANT, STATES, SIGNED, PARAM, GRAD, STATE, TRANSFORM, RANDOM, BLOCK, True,
            )  # fmt: skip


def _constants(
    rule: StepRule, scalars_function: Any, rule_function: Any, codecs: Codecs, variant: int, *, aligned: bool
) -> dict[str, Any]:
    random = codecs.param == ParamCodec.BFLOAT16_STOCHASTIC or codecs.state in (
        StateCodec.BFLOAT16_STOCHASTIC,
        StateCodec.BLOCK8,
    )
    return {
        "RULE": rule_function,
        "SCALARS": scalars_function,
        "VARIANT": variant,
        "STATES": rule.state_counts[variant],
        "SIGNED": tuple(state.signed for state in rule.states),
        "HYPER": len(rule.hyper),
        "PARAM": int(codecs.param),
        "GRAD": codecs.grad,
        "STATE": int(codecs.state),
        "TRANSFORM": int(codecs.transform),
        "RANDOM": random,
        "BLOCK": TILE_ELEMENTS,
        "ALIGNED": aligned,
    }


def _stream_bytes(rule: StepRule, codecs: Codecs, variant: int) -> list[int]:
    """Bytes of an element of every hot stream."""
    grad = next(dtype for dtype, code in DTYPE_CODES.items() if code == codecs.grad)
    dtypes = [grad, *(dtype for dtype in param_dtypes(codecs.param) if dtype is not None)]
    if rule.state_counts[variant]:
        dtypes.append(state_dtype(codecs.state))
    return [dtype.itemsize for dtype in dtypes]


def _item_bytes(rule: StepRule, codecs: Codecs, variant: int) -> int:
    """Bytes of an element of the stream of which a thread moves 16 bytes at once: the widest.

    Of a narrower stream it then moves 8 or 4, still whole lines a warp. With 16 bytes of the narrowest, 8 or 16
    elements to a thread keep 72 to 200 registers busy, and too few threads are resident. 8-bit codes take the registers
    of fp32.
    """
    return 4 if codecs.state == StateCodec.BLOCK8 else max(_stream_bytes(rule, codecs, variant))


def step_launcher(rule: StepRule, scalars_function: Any, rule_function: Any) -> Callable[..., None]:
    """The Triton backend of a rule: launches one program per chunk; same contract as the reference.

    Args:
        rule: Which.
        scalars_function: Jitted ``(hyper_ptr, multiplier, step, VARIANT)`` to eight fp32 scalars.
        rule_function: Jitted ``(p, g, s0, s1, s2, c0..c7, VARIANT)`` to ``(p, s0, s1, s2)``.
    """

    def step_(operands: Operands, scalars: torch.Tensor, hyper: torch.Tensor, codecs: Codecs, variant: int) -> None:
        cache = operands.cache
        if cache.chunks == 0:
            return
        table = cache.on_device(scalars.device)
        constants = _constants(rule, scalars_function, rule_function, codecs, variant, aligned=cache.aligned())
        launch(
            _step_kernel,
            cache.chunks,
            table,
            scalars,
            hyper,
            len(operands["params"]),
            **constants,
            num_warps=fold_warps(_item_bytes(rule, codecs, variant), warp_size()),
            capped=True,
        )

    return step_


def step_variants(rule: StepRule, scalars_function: Any, rule_function: Any) -> list[Variant]:
    """What is compiled ahead of time: every codec on every side once and every variant, not their product."""

    def combinations() -> Iterator[tuple[Codecs, int]]:
        plain = next(v for v in rule.variants if rule.state_counts[v] or len(rule.variants) == 1)
        for variant in rule.variants:
            yield Codecs(ParamCodec.FLOAT32, 0, StateCodec.FLOAT32), variant
        for param in list(ParamCodec)[1:]:
            yield Codecs(param, 0, StateCodec.FLOAT32), plain
        for state in list(StateCodec)[1:]:
            yield Codecs(ParamCodec.FLOAT32, 0, state), plain
        yield Codecs(ParamCodec.BFLOAT16, 1, StateCodec.BFLOAT16), plain
        yield Codecs(ParamCodec.FLOAT16, 2, StateCodec.FLOAT16), plain
        yield Codecs(ParamCodec.BFLOAT16_SPLIT8, 1, StateCodec.BLOCK8), plain
        yield Codecs(ParamCodec.FLOAT32, 0, StateCodec.FLOAT32, GradTransform.LIMIT), plain
        yield Codecs(ParamCodec.FLOAT32, 0, StateCodec.FLOAT32, GradTransform.UNITS), plain

    return [
        Variant(
            _step_kernel,
            {"table_ptr": "*i64", "scalars_ptr": "*fp64", "hyper_ptr": "*fp64", "rows": "i32"},
            _constants(rule, scalars_function, rule_function, codecs, variant, aligned=True),
            item_bytes=_item_bytes(rule, codecs, variant),
            hot_bits=128 * min(_stream_bytes(rule, codecs, variant)) // _item_bytes(rule, codecs, variant),
            hot_bytes=int(4096 * step_bytes(rule, codecs, variant)) // 4096 * 4096,  # block exponents are not hot
            capped=True,
        )
        for codecs, variant in combinations()
    ]
