"""What a recorder keeps so that training can be run again: micro-batches, random numbers, options of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.rollback._json_tensor import from_tensor, to_tensor
from gradkern.rollback._layout import digest_parameters

__all__ = ["ReplayLog", "StepLog", "describe_options", "digest_model"]

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class StepLog:
    """Of one optimizer step.

    Attributes:
        sizes: Visits of each micro-batch, in order.
        states: Of each, the state of torch's generator of the CPU before it, uint8.
        options: See :func:`describe_options`.
        digest: See :func:`digest_model`, of the model after the step; None where it was not taken.
    """

    sizes: Sequence[int]
    states: Sequence[Tensor]
    options: Mapping[str, Any]
    digest: str | None

    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(state.nbytes for state in self.states)


@dataclass(frozen=True, slots=True)
class ReplayLog:
    """Of a segment.

    Attributes:
        step_bounds: Shape ``(steps + 1,)``, int64: step ``t`` has the micro-batches from ``[t]`` to ``[t + 1]``.
        batch_bounds: Shape ``(micro-batches + 1,)``, int64: of each its visits.
        state_index: Shape ``(micro-batches,)``, int64: of each its row of ``states``.
        states: Shape ``(n, bytes)``, uint8.
        options: UTF-8 of a JSON list, uint8: of every step its options.
        digests: Shape ``(steps, 32)``, uint8; zeros where none was taken.
    """

    step_bounds: Tensor
    batch_bounds: Tensor
    state_index: Tensor
    states: Tensor
    options: Tensor
    digests: Tensor

    @classmethod
    def build(cls, steps: Sequence[StepLog]) -> ReplayLog:
        """Join the logs of consecutive steps; equal states are kept once."""
        states = [state for step in steps for state in step.states]
        rows: dict[bytes, int] = {}
        index = [rows.setdefault(state.numpy().tobytes(), len(rows)) for state in states]
        by_row = dict(zip(index, states, strict=True))
        digests = [bytes.fromhex(step.digest) if step.digest else bytes(_DIGEST_BYTES) for step in steps]
        return cls(
            step_bounds=_bounds([len(step.sizes) for step in steps]),
            batch_bounds=_bounds([size for step in steps for size in step.sizes]),
            state_index=torch.tensor(index, dtype=torch.int64),
            states=torch.stack([by_row[row] for row in range(len(rows))])
            if rows
            else torch.empty(0, 0, dtype=torch.uint8),
            options=to_tensor([step.options for step in steps]),
            digests=torch.tensor([list(digest) for digest in digests], dtype=torch.uint8),
        )

    @classmethod
    def join(cls, parts: Sequence[ReplayLog]) -> ReplayLog:
        """Put those of consecutive segments into one."""
        return cls.build([step for part in parts for step in part.steps()])

    def steps(self) -> list[StepLog]:
        """The logs of the steps."""
        options, sizes = from_tensor(self.options), self.batch_bounds.diff().tolist()
        bounds = self.step_bounds.tolist()
        return [
            StepLog(
                sizes[first:end],
                [self.states[row] for row in self.state_index[first:end].tolist()],
                options[at],
                self.digests[at].numpy().tobytes().hex() if bool(self.digests[at].any()) else None,
            )
            for at, (first, end) in enumerate(pairwise(bounds))
        ]


def describe_options(model: nn.Module, param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What can change from step to step, fit for JSON: plain options of the groups, modules that are in eval mode."""
    groups = [
        {
            key: float(value) if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params" and _is_plain(value)
        }
        for group in param_groups
    ]
    is_evaluating = [name for name, module in model.named_modules() if not module.training]
    return {"groups": groups, "eval": is_evaluating}


def _is_plain(value: object) -> bool:
    """Whether an option is a number, a text, or some of them."""
    if isinstance(value, tuple):
        return all(isinstance(each, (bool, int, float, str)) for each in value)
    return isinstance(value, (bool, int, float, str, type(None))) or (isinstance(value, Tensor) and value.numel() == 1)


def digest_model(model: nn.Module) -> str:
    """Of all parameters and buffers, bit for bit."""
    return digest_parameters({**dict(model.named_parameters()), **dict(model.named_buffers())})


def _bounds(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
