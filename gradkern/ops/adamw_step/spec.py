"""Specification of ``adamw_step_``."""

from __future__ import annotations

from typing import Any

import torch

from gradkern.ops import _registry
from gradkern.ops._spec import OpSpec
from gradkern.ops._table import Operands
from gradkern.ops.adamw_step import reference

__all__ = ["COLUMNS", "SPEC"]

COLUMNS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")


def _native(operands: Operands, scalars: torch.Tensor, hyper: reference.AdamWHyper) -> None:
    codes = map(operands.cache.dtype_code, ("params", "grads", "exp_avgs"))
    torch.ops.gradkern._adamw_step_table_(operands.table, scalars, *codes, *hyper)


def _traceable(*lists_and_scalars: Any, **hyper: Any) -> None:
    *lists, scalars = lists_and_scalars
    columns = dict(zip(COLUMNS, lists, strict=True))
    columns["max_exp_avg_sqs"] = columns["max_exp_avg_sqs"] or None
    operands = Operands(SPEC.name, columns)
    _registry.select(SPEC, operands.device())(operands, scalars, reference.AdamWHyper(**hyper))


def _fake(params: list[torch.Tensor], grads: list[torch.Tensor], *_: Any, **__: Any) -> None:
    torch._check(len(params) == len(grads), lambda: "adamw_step_: lists of unequal length")


SPEC = _registry.register(
    OpSpec(
        name="adamw_step_",
        schema=(
            "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
            "Tensor(d!)[] max_exp_avg_sqs, Tensor[] steps, Tensor scalars, *, float lr, float beta1, float beta2, "
            "float eps, float weight_decay, bool maximize) -> ()"
        ),
        reference=reference.adamw_step_,
        native=_native,
        triton="gradkern.ops.adamw_step.triton:adamw_step_",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda param_dtype, grad_dtype, state_dtype: (
            2 * param_dtype.itemsize + grad_dtype.itemsize + 4 * state_dtype.itemsize
        ),
    )
)
