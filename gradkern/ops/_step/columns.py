"""The columns of a step's table, the same for every rule, so that one kernel walks them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._step.codecs import StateCodec, param_dtypes, state_blocks, state_dtype
from gradkern.ops._step.rule import MAX_STATES, Codecs, State, StepRule
from gradkern.ops._table import AddressTable, Operands, Role

__all__ = ["COLUMNS", "FIRST_STATE", "scales_of", "step_operands"]

FIRST_STATE = 7
"""Position of the first state; ``csrc/step_ops.cpp`` has the same order."""

COLUMNS = FIRST_STATE + 2 * MAX_STATES

_GRAD_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def scales_of(state: State) -> str:
    """Name of the operand that holds a state's block exponents."""
    return f"{state.name}_scales"


def step_operands(
    rule: StepRule,
    codecs: Codecs,
    variant: int,
    tensors: Mapping[str, Sequence[torch.Tensor] | None],
    integers: Mapping[str, Sequence[int]],
    *,
    cache: AddressTable | None = None,
    settled: bool = False,
    same_kinds: bool = False,
) -> Operands:
    """The checked operands of a step.

    Args:
        rule: Which.
        codecs: How the operands are stored.
        variant: Of the rule.
        tensors: ``params``, ``grads``, ``steps``, the states by plural name, and where the codecs want them
            ``remainders``, ``units`` and block exponents by ``<state>_scales``.
        integers: ``ids`` of the parameters, for random words; ``unit_sizes`` with ``units``.
        cache: Table kept from the last call with the same operands.
        settled: Only parameters and gradients can have moved since the last call.
        same_kinds: Where settled, they are of the dtypes, devices, shapes and strides of the last call.

    Raises:
        ValueError: Lists of unequal length or operands of unequal layout; nothing has been written.
        TypeError: A dtype that the codecs do not store.
    """
    param, remainder = param_dtypes(codecs.param)
    columns: dict[str, Sequence[torch.Tensor] | Sequence[int] | None] = {
        "params": tensors["params"],
        "remainders": tensors.get("remainders"),
        "grads": tensors["grads"],
        "units": tensors.get("units"),
        "unit_sizes": integers.get("unit_sizes"),
        "ids": integers.get("ids"),
        "steps": tensors["steps"],
    }
    roles = {
        "params": Role(param),
        "remainders": Role(remainder),
        "grads": Role(_GRAD_DTYPES[codecs.grad]),
        "units": Role(torch.float32, like_first=False),
        "unit_sizes": None,
        "ids": None,
        "steps": Role(torch.float32, like_first=False),
    }
    present = rule.variant_states(variant)
    for k in range(MAX_STATES):
        state = present[k] if k < len(present) else None
        name = f"{state.name}s" if state else f"state {k}"
        scales = scales_of(state) if state else f"scales {k}"
        columns[name] = tensors[name] if state else None
        columns[scales] = tensors[scales] if state and codecs.state == StateCodec.BLOCK8 else None
        roles[name] = Role(state_dtype(codecs.state))
        roles[scales] = Role(torch.uint8, like_first=False, numel=state_blocks)
    moving = ("params", "grads") if settled else None
    return Operands(rule.name, columns, cache, roles=roles, moving=moving, checked=settled and same_kinds)
