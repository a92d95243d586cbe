"""Specification of ``accumulate_``."""

from __future__ import annotations

import torch

from gradkern.ops import _registry
from gradkern.ops._spec import OpSpec
from gradkern.ops._table import Operands, Role
from gradkern.ops.accumulate import reference

__all__ = ["ROLES", "SPEC"]

ROLES = {"main_grads": Role(torch.float32)}


def _native(operands: Operands, partials: torch.Tensor | None, *, overwrite: bool) -> None:
    torch.ops.gradkern._accumulate_table_(operands.table, operands.cache.dtype_code("grads"), partials, overwrite)


def _traceable(
    main_grads: list[torch.Tensor],
    grads: list[torch.Tensor],
    partials: torch.Tensor | None,
    *,
    overwrite: bool,
) -> None:
    operands = Operands(SPEC.name, {"main_grads": main_grads, "grads": grads}, roles=ROLES)
    _registry.select(SPEC, operands.device())(operands, partials, overwrite=overwrite)


def _fake(
    main_grads: list[torch.Tensor],
    grads: list[torch.Tensor],
    partials: torch.Tensor | None,
    *,
    overwrite: bool,
) -> None:
    torch._check(len(main_grads) == len(grads), lambda: "accumulate_: lists of unequal length")


SPEC = _registry.register(
    OpSpec(
        name="accumulate_",
        schema="(Tensor(a!)[] main_grads, Tensor[] grads, Tensor(b!)? partials, *, bool overwrite) -> ()",
        reference=reference.accumulate_,
        native=_native,
        triton="gradkern.ops.accumulate.triton:accumulate_",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda grad_dtype, overwrite: grad_dtype.itemsize + (4 if overwrite else 8),
    )
)
