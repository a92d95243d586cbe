"""A rule: what an optimizer does to one fp32 number. Everything else about a step is shared."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gradkern.ops._step.codecs import GradTransform, ParamCodec, StateCodec

__all__ = ["MAX_STATES", "Codecs", "State", "StepRule", "round_fp32"]

MAX_STATES = 3


@dataclass(frozen=True, slots=True)
class State:
    """One tensor of optimizer state.

    Attributes:
        name: Key in ``optimizer.state[param]``; the op's operand is its plural.
        signed: Whether it can be negative, which decides its 8-bit codes.
    """

    name: str
    signed: bool


@dataclass(frozen=True, slots=True)
class StepRule:
    """One optimizer rule.

    Attributes:
        name: Of the op: ``adamw_step_``.
        states: All states that any variant has, in order.
        hyper: Names of the hyper-parameters, in the order of the fp64 block; the seed follows them.
        state_counts: States of each variant: the first so many of ``states``.
        scalars: ``(hyper, grad_multiplier, step, variant)`` to the fp32 scalars of one step, formed in fp64.
        update: ``(param, grad, states, scalars, variant)``, all flat fp32 tensors, to the new parameter and states.
        sample_hyper: Hyper-parameters for tests and benchmarks.
        triton: ``"module:function"`` of the jitted rule.
    """

    name: str
    states: tuple[State, ...]
    hyper: tuple[str, ...]
    state_counts: tuple[int, ...]
    scalars: Callable[[Sequence[float], float, int, int], tuple[float, ...]]
    update: Callable[
        [torch.Tensor, torch.Tensor, Sequence[torch.Tensor], tuple[float, ...], int],
        tuple[torch.Tensor, Sequence[torch.Tensor]],
    ]
    sample_hyper: tuple[float, ...]
    triton: str

    @property
    def variants(self) -> range:
        """Numbers of the rule's variants (with and without amsgrad, and so on)."""
        return range(len(self.state_counts))

    def variant_states(self, variant: int) -> tuple[State, ...]:
        """States of one variant."""
        return self.states[: self.state_counts[variant]]


@dataclass(frozen=True, slots=True)
class Codecs:
    """How the operands of a step are stored."""

    param: ParamCodec
    grad: int  # a code of gradkern.ops._chunks.DTYPE_CODES
    state: StateCodec
    transform: GradTransform = GradTransform.NONE


def round_fp32(value: float) -> float:
    """``value`` rounded once to fp32, inf beyond its range."""
    return ctypes.c_float(value).value  # C's conversion, a fiftieth of the time of a tensor's
