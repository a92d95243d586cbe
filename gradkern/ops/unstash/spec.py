"""Specification of ``unstash_``."""

from __future__ import annotations

import torch

from gradkern.ops import _registry
from gradkern.ops._spec import OpSpec
from gradkern.ops._step.codecs import STATE_BLOCK, state_blocks
from gradkern.ops._table import Operands, Role
from gradkern.ops.unstash import reference

__all__ = ["ROLES", "SPEC"]

ROLES = {"codes": Role(torch.uint8), "exponents": Role(torch.uint8, like_first=False, numel=state_blocks)}


def _native(operands: Operands, multiplier: torch.Tensor) -> None:
    torch.ops.gradkern._unstash_table_(operands.table, operands.cache.dtype_code("grads"), multiplier)


def _traceable(
    grads: list[torch.Tensor], codes: list[torch.Tensor], exponents: list[torch.Tensor], multiplier: torch.Tensor
) -> None:
    operands = Operands(SPEC.name, {"grads": grads, "codes": codes, "exponents": exponents}, roles=ROLES)
    _registry.select(SPEC, operands.device())(operands, multiplier)


def _fake(
    grads: list[torch.Tensor], codes: list[torch.Tensor], exponents: list[torch.Tensor], multiplier: torch.Tensor
) -> None:
    torch._check(len(grads) == len(codes) == len(exponents), lambda: "unstash_: lists of unequal length")


SPEC = _registry.register(
    OpSpec(
        name="unstash_",
        schema="(Tensor(a!)[] grads, Tensor[] codes, Tensor[] exponents, Tensor multiplier) -> ()",
        reference=reference.unstash_,
        native=_native,
        triton="gradkern.ops.unstash.triton:unstash_",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda grad_dtype: grad_dtype.itemsize + 1 + 1 / STATE_BLOCK,
    )
)
