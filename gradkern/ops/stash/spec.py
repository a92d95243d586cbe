"""Specification of ``stash_``."""

from __future__ import annotations

import torch

from gradkern.ops import _registry
from gradkern.ops._spec import OpSpec
from gradkern.ops._step.codecs import STATE_BLOCK, state_blocks
from gradkern.ops._table import Operands, Role
from gradkern.ops.stash import reference

__all__ = ["ROLES", "SPEC"]

ROLES = {
    "codes": Role(torch.uint8),
    "exponents": Role(torch.uint8, like_first=False, numel=state_blocks),
    "keys": None,
}


def _native(operands: Operands, partials: torch.Tensor) -> None:
    torch.ops.gradkern._stash_table_(operands.table, operands.cache.dtype_code("grads"), partials)


def _traceable(
    grads: list[torch.Tensor],
    codes: list[torch.Tensor],
    exponents: list[torch.Tensor],
    partials: torch.Tensor,
    keys: list[int],
) -> None:
    operands = Operands(SPEC.name, {"grads": grads, "codes": codes, "exponents": exponents, "keys": keys}, roles=ROLES)
    _registry.select(SPEC, operands.device())(operands, partials)


def _fake(
    grads: list[torch.Tensor],
    codes: list[torch.Tensor],
    exponents: list[torch.Tensor],
    partials: torch.Tensor,
    keys: list[int],
) -> None:
    torch._check(len(grads) == len(codes) == len(exponents) == len(keys), lambda: "stash_: lists of unequal length")


SPEC = _registry.register(
    OpSpec(
        name="stash_",
        schema="(Tensor[] grads, Tensor(a!)[] codes, Tensor(b!)[] exponents, Tensor(c!) partials, int[] keys) -> ()",
        reference=reference.stash_,
        native=_native,
        triton="gradkern.ops.stash.triton:stash_",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda grad_dtype: grad_dtype.itemsize + 1 + 1 / STATE_BLOCK,
    )
)
