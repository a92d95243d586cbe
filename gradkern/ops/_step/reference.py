"""Reference of every step: decode, transform, the rule, encode, tensor by tensor."""

from __future__ import annotations

import torch

from gradkern.ops._chunks import flat_view
from gradkern.ops._step.codecs import (
    GradTransform,
    StateCodec,
    decode_param,
    decode_state,
    encode_param,
    encode_state,
    stirred_bits,
)
from gradkern.ops._step.columns import scales_of
from gradkern.ops._step.random import key_of
from gradkern.ops._step.rule import Codecs, StepRule
from gradkern.ops._table import Operands
from gradkern.ops.step_scalars import reference as scalar_layout

__all__ = ["sqrt_fp32", "step_"]


def sqrt_fp32(x: torch.Tensor) -> torch.Tensor:
    """Root of fp32 values rounded to nearest.

    ``torch.sqrt`` of fp32 may run in MKL's vector library, which is off by one ulp in about 0.6 % of elements. The fp64
    root, even off by an ulp of its own, rounds to the right fp32 value: no root of a 24-bit number lies within 2^-50 of
    a midpoint between two of them.
    """
    return x.double().sqrt().float()


def step_(
    rule: StepRule, operands: Operands, scalars: torch.Tensor, hyper: torch.Tensor, codecs: Codecs, variant: int
) -> None:
    """Update parameters, remainders and states of every row in place."""
    block = scalars.tolist()
    if block[scalar_layout.SKIP] != 0.0:
        return
    *numbers, seed = hyper.tolist()
    states = rule.variant_states(variant)
    scalars_of_step: dict[float, tuple[float, ...]] = {}
    for i, tensor in enumerate(operands["params"]):
        step = float(operands["steps"][i])
        if step not in scalars_of_step:
            multiplier = block[scalar_layout.GRAD_MULTIPLIER]
            scalars_of_step[step] = rule.scalars(numbers, multiplier, int(step), variant)
        param = flat_view(tensor)
        remainder = flat_view(operands["remainders"][i]) if operands["remainders"] else None
        grad = flat_view(operands["grads"][i]).float()
        if codecs.transform == GradTransform.LIMIT:
            limit = torch.tensor(block[scalar_layout.LIMIT], dtype=torch.float64).float()
            grad = torch.minimum(torch.maximum(grad, -limit), limit)
        elif codecs.transform == GradTransform.UNITS:
            units = operands["units"][i].repeat_interleave(operands.integers("unit_sizes")[i])
            grad = grad * units[: grad.numel()]
        key = key_of(int(seed), int(step), operands.integers("ids")[i])
        cells = []
        for state in states:
            scales = operands[scales_of(state)]
            cells.append((state, flat_view(operands[f"{state.name}s"][i]), scales[i] if scales else None))
        values = [decode_state(codecs.state, cell, scale, signed=state.signed) for state, cell, scale in cells]
        x, updated = rule.update(
            decode_param(codecs.param, param, remainder), grad, values, scalars_of_step[step], variant
        )
        stirred = stirred_bits(updated[0], key) if codecs.state == StateCodec.BLOCK8 and states else None
        for k, (value, (state, cell, scale)) in enumerate(zip(updated, cells, strict=True)):
            encode_state(codecs.state, value, cell, scale, key, signed=state.signed, half=min(k, 1), stirred=stirred)
        encode_param(codecs.param, x, param, remainder, key)
