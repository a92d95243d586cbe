"""The model as if some samples had never been trained on: by training again, or by carrying their absence forwards.

``exact`` trains again. ``fast`` follows what their absence does, step by step, by the recursion that
:mod:`gradkern.rollback._sweep` runs backwards for a query: with ``δ`` the change of the parameters, ``m`` that of the
momentum, ``F`` the samples to forget and ``H_t`` the reweighted empirical Fisher matrix of the step,

    m ← momentum m + share (H_t δ - Σ_{i in F} g_{i,t}),    δ ← decay δ - P_t ⊙ m.

Without ``H`` that is minus what the samples themselves added. Taking it off alone does harm: later steps had reacted to
it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradkern.errors import UndoRefusedError
from gradkern.loss import Batch
from gradkern.rollback._layout import Layout
from gradkern.rollback._output import output_tensor
from gradkern.rollback._records import Record
from gradkern.rollback._segment import Segment
from gradkern.rollback._smoothing import unsmooth
from gradkern.rollback._sweep import norms, require_curvature

__all__ = ["Undone", "apply_change", "propagate"]

# Of the change of the parameters, what is made first, to see where the outputs go. Less would drown in rounding.
_FIRST_PART = 0.125

# Of the change of the outputs, what may not be linear in that of the parameters.
_MOST_NONLINEAR = 0.5

# Of the norm of the change, relative to that of what the samples themselves added. Later steps pull it back.
_MOST_GROWTH = 1.25


@dataclass(frozen=True, slots=True)
class Undone:
    """A model without some samples.

    Attributes:
        model: A copy of the given model with other parameters; ``"exact"`` also has the buffers of the new training.
        method: ``"exact"`` or ``"fast"``.
        growth: Of ``"fast"``: norm of the change over that of what the samples added; None for ``"exact"``.
        nonlinearity: Of ``"fast"``: share of the change of the outputs on ``probe`` that is not linear in that of the
            parameters, by the outputs after its first eighth; None for ``"exact"``.
    """

    model: nn.Module
    method: str
    growth: float | None = None
    nonlinearity: float | None = None


def propagate(
    layout: Layout, owned: Mapping[int, nn.Parameter], segments: Iterator[Segment], forgotten: Tensor
) -> tuple[dict[int, Tensor], float]:
    """Carry the absence of some samples through all steps.

    Args:
        layout: The ledger's layout.
        owned: The owned parameters, by index.
        segments: From the first to the last.
        forgotten: Sample ids.

    Returns:
        The change of every owned parameter, fp32, and how its norm compares to that without ``H``.

    Raises:
        NoCurvatureError: A visit has no curvature weight.
    """
    change = _Change(layout, owned)
    for segment in segments:
        require_curvature(segment.curvature)
        change.through(segment, torch.isin(segment.visit_ids, forgotten))
    return change.result()


class _Change:
    """``δ`` and ``m`` of every parameter: with ``H`` in row 0, without it in row 1."""

    def __init__(self, layout: Layout, owned: Mapping[int, nn.Parameter]) -> None:
        self._streams = layout.streams_by_parameter(owned)
        self._parameters = {index: torch.zeros(2, *parameter.shape) for index, parameter in owned.items()}
        self._momenta = {index: torch.zeros_like(each) for index, each in self._parameters.items()}

    def through(self, segment: Segment, is_forgotten: Tensor) -> None:
        """Go through a segment."""
        for step in range(segment.steps):
            first_visit, end_visit = segment.visit_bounds[step : step + 2].tolist()
            inner = torch.zeros(1, end_visit - first_visit)
            parts: list[tuple[int, Record]] = []
            for index, streams in self._streams.items():
                for stream in streams:
                    if stream in segment.records:
                        record = segment.records[stream].between(first_visit, end_visit)
                        parts.append((index, record))
                        found = record.inner(self._parameters[index][:1])
                        inner.index_add_(1, record.visit.long() - first_visit, found)
            forgotten = is_forgotten[first_visit:end_visit].float()
            reaction = inner[0] * segment.curvature[first_visit:end_visit]
            coefficients = torch.stack([reaction - forgotten, -forgotten])
            gradients = {index: torch.zeros_like(each) for index, each in self._parameters.items()}
            for index, record in parts:
                record.add_to(gradients[index], coefficients[:, record.visit.long() - first_visit])
            for index, parameter in self._parameters.items():
                scalars = segment.step_scalars(step, index)
                if scalars is not None:
                    stored = [tensor[step] for tensor in segment.preconditioners[index]]
                    momentum = self._momenta[index].mul_(scalars.momentum)
                    momentum.add_(gradients[index], alpha=scalars.grad_weight * scalars.multiplier)
                    parameter.mul_(scalars.decay).addcmul_(unsmooth(stored, parameter.shape[1:]), momentum, value=-1.0)

    def result(self) -> tuple[dict[int, Tensor], float]:
        """The change, and its norm over that without ``H``."""
        with_reaction, without = norms(self._parameters.values()).tolist()
        return {index: each[0] for index, each in self._parameters.items()}, with_reaction / without if without else 0.0


def apply_change(model: nn.Module, changes: Mapping[str, Tensor], growth: float, probe: Batch, share: float) -> Undone:
    """Change a copy of a model, unless the change is too large to be foretold to first order.

    Args:
        model: The trained model, left as it is.
        changes: Of parameters by name.
        growth: See :class:`Undone`.
        probe: Inputs on which outputs are compared: a tensor, a pair ``(inputs, target)`` or a mapping.
        share: Of the change that is made.

    Raises:
        UndoRefusedError: The change grew or is not linear.
    """
    if growth > _MOST_GROWTH:
        raise UndoRefusedError(
            f"undo: the change grew to {growth:.3g} times what the samples themselves added, expected at most "
            f"{_MOST_GROWTH}: the steps were too large for the curvature, and the change is noise; use method='exact'"
        )
    twin = copy.deepcopy(model).eval()
    parts = [(parameter, changes[name]) for name, parameter in twin.named_parameters() if name in changes]
    with torch.no_grad():
        seen = [_output(twin, probe)]
        for part in (_FIRST_PART, 1.0 - _FIRST_PART):
            for parameter, change in parts:
                parameter.add_(change.to(parameter), alpha=share * part)
            seen.append(_output(twin, probe))
    start, first, end = seen
    distance = float(torch.linalg.vector_norm(end - start))
    foretold = (first - start) / _FIRST_PART
    if not distance > 0.0:
        raise UndoRefusedError(
            "undo: the outputs on probe do not move by the change, so they cannot tell whether to trust it; pass "
            "inputs like those of the samples"
        )
    nonlinearity = float(torch.linalg.vector_norm(end - start - foretold)) / distance
    if not nonlinearity <= _MOST_NONLINEAR:
        raise UndoRefusedError(
            f"undo: of the change of the outputs on probe {nonlinearity:.0%} is not linear in that of the parameters, "
            f"expected at most {_MOST_NONLINEAR:.0%}: the samples matter too much for method='fast'; forget fewer at a "
            f"time, or use method='exact'"
        )
    for module, given in zip(twin.modules(), model.modules(), strict=True):
        module.training = given.training
    return Undone(twin, "fast", growth, nonlinearity)


def _output(model: nn.Module, probe: Batch) -> Tensor:
    """What the model gives for the inputs of a batch: a tensor, or its logits."""
    made = model(**probe) if isinstance(probe, Mapping) else model(probe if isinstance(probe, Tensor) else probe[0])
    return output_tensor(made, "undo")
