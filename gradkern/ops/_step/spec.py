"""From a rule to a registered op: schema, fake, and the callables of each backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gradkern import _native
from gradkern.ops import _registry
from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import OpSpec
from gradkern.ops._step import reference
from gradkern.ops._step.codecs import GradTransform, ParamCodec, StateCodec, param_dtypes, state_dtype
from gradkern.ops._step.columns import COLUMNS, scales_of, step_operands
from gradkern.ops._step.rule import Codecs, StepRule
from gradkern.ops._table import Operands

__all__ = ["StepOp", "list_names", "register_step", "step_bytes"]


@dataclass(frozen=True, slots=True)
class StepOp:
    """A rule with the op that runs it."""

    rule: StepRule
    spec: OpSpec


def step_bytes(rule: StepRule, codecs: Codecs, variant: int) -> float:
    """Bytes that a step reads and writes for one element: every operand once each way, block exponents included."""
    param, remainder = param_dtypes(codecs.param)
    whole_master = codecs.param in (ParamCodec.BFLOAT16_MASTER32, ParamCodec.FLOAT16_MASTER32)
    param_bytes = param.itemsize if whole_master else 2 * param.itemsize  # with a whole master it is only written
    remainder_bytes = 0 if remainder is None else 2 * remainder.itemsize
    grad_bytes = {code: dtype.itemsize for dtype, code in DTYPE_CODES.items()}[codecs.grad]
    state_bytes = 2.0 * state_dtype(codecs.state).itemsize
    if codecs.state == StateCodec.BLOCK8:
        state_bytes += 2 / 64
    return param_bytes + remainder_bytes + grad_bytes + rule.state_counts[variant] * state_bytes


def _run_native(
    rule: StepRule, operands: Operands, scalars: torch.Tensor, hyper: torch.Tensor, codecs: Codecs, variant: int
) -> None:
    op = getattr(torch.ops.gradkern, f"_{rule.name}table_")
    op(operands.table, scalars, hyper, codecs.param, codecs.grad, codecs.state, codecs.transform, variant)


def list_names(rule: StepRule) -> list[str]:
    """Names of the lists of the traceable op, in order."""
    states = [name for state in rule.states for name in (f"{state.name}s", scales_of(state))]
    return ["params", "remainders", *states, "grads", "units", "steps"]


def _schema(rule: StepRule) -> str:
    lists = []
    for i, name in enumerate(list_names(rule)):
        read_only = name in ("grads", "units", "steps")
        lists.append(f"Tensor[] {name}" if read_only else f"Tensor({chr(ord('a') + i)}!)[] {name}")
    return (
        f"({', '.join(lists)}, Tensor scalars, Tensor hyper, *, int variant, int param_codec, int state_codec, "
        "int transform, int[] ids, int[] unit_sizes) -> ()"
    )


def _traceable(
    op: list[StepOp],
    *lists_and_blocks: Any,
    variant: int,
    param_codec: int,
    state_codec: int,
    transform: int,
    ids: Sequence[int],
    unit_sizes: Sequence[int],
) -> None:
    rule = op[0].rule
    *lists, scalars, hyper = lists_and_blocks
    tensors = {name: tensors or None for name, tensors in zip(list_names(rule), lists, strict=True)}
    params = tensors["params"] or []
    grads = tensors["grads"] or []
    grad = DTYPE_CODES[grads[0].dtype] if grads else 0
    codecs = Codecs(ParamCodec(param_codec), grad, StateCodec(state_codec), GradTransform(transform))
    required = ["params", "grads", "steps", *(f"{state.name}s" for state in rule.variant_states(variant))]
    tensors |= {name: tensors[name] or [] for name in required}
    if not params:
        return
    integers = {"ids": list(ids), "unit_sizes": list(unit_sizes)}
    operands = step_operands(rule, codecs, variant, tensors, {k: v for k, v in integers.items() if v})
    _registry.select(op[0].spec, operands.device())(operands, scalars, hyper, codecs, variant)


def _fake(*lists_and_blocks: Any, **_: Any) -> None:
    params, grads = lists_and_blocks[0], lists_and_blocks[-5]
    torch._check(len(params) == len(grads), lambda: "step: lists of unequal length")


def register_step(rule: StepRule) -> StepOp:
    """Register the op of a rule."""
    _native.define(
        f"_{rule.name}table_(Tensor table, Tensor scalars, Tensor hyper, int param, int grad, int state, "
        "int transform, int variant) -> ()"
    )
    holder: list[StepOp] = []  # the traceable op needs what is made from it
    spec = _registry.register(
        OpSpec(
            name=rule.name,
            schema=_schema(rule),
            reference=partial(reference.step_, rule),
            native=partial(_run_native, rule),
            triton=f"{rule.triton.partition(':')[0]}:step_",
            traceable=partial(_traceable, holder),
            fake=_fake,
            bytes_moved=partial(step_bytes, rule),
        )
    )
    holder.append(StepOp(rule, spec))
    return holder[0]


assert COLUMNS == 13  # noqa: S101  csrc/step_ops.cpp counts on it
