"""Influence by one pass backwards in time over the ledger, of any number of functions of the parameters at once.

A step is, of every parameter, ``M_t = momentum M_{t-1} + share g_t`` and ``θ_t = decay θ_{t-1} - P_t ⊙ M_t``, where
``share`` is the gradient's weight times the clip coefficient. Let ``λ`` be what a function gains by a change of ``θ_t``
and ``μ`` what it gains by one of ``M_t``. From the last step to the first,

    μ ← μ - P_t ⊙ λ,    u = share μ,    score_i ← score_i - ⟨u, g_{i,t}⟩,    λ ← decay λ + H_t u,    μ ← momentum μ,

for the gradient that a step used was taken at the parameters before it, and its change there is ``H_t`` times theirs.

``direct`` takes ``H = 0``: what each sample's own steps did, and not how later ones reacted. ``ref`` takes the
reweighted empirical Fisher matrix ``H_t = Σ_i w_i g_i g_iᵀ`` over the samples of the step, of which the records hold
all there is; the weights are those of :mod:`gradkern.rollback._curvature`. ``P`` is the smoothed preconditioner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.errors import LedgerError
from gradkern.rollback._layout import Layout
from gradkern.rollback._records import Record
from gradkern.rollback._segment import Segment
from gradkern.rollback._smoothing import unsmooth

__all__ = ["Adjoint", "NoCurvatureError", "Swept", "norms", "require_curvature", "sweep"]


class NoCurvatureError(LedgerError):
    """A ledger lacks the curvature of a sample's loss."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found.

    Attributes:
        ids: The different sample ids, ascending, int64, shape ``(samples,)``.
        scores: How much each function would rise had a sample's steps not been taken, fp64, shape
            ``(functions, samples)``.
        growth: ``‖λ‖`` at the first step over that at the last, shape ``(functions,)``, well above 1 where the sweep
            has gone wild; 0 for a function without a gradient.
    """

    ids: Tensor
    scores: Tensor
    growth: Tensor


def sweep(layout: Layout, gradients: Mapping[int, Tensor], segments: Iterator[Segment], curvature: float) -> Swept:
    """Score every sample in a ledger.

    Args:
        layout: The ledger's layout.
        gradients: Gradients of the functions by owned parameter, fp32, in host memory, shape
            ``(functions, *parameter)``.
        segments: From the last to the first; only one is held at a time.
        curvature: Factor of ``H``; 0 leaves it out.

    Raises:
        NoCurvatureError: ``curvature`` is not 0 and a visit has no curvature weight.
    """
    functions = len(next(iter(gradients.values())))
    adjoint = Adjoint(layout, gradients, curvature)
    seen_ids = [torch.empty(0, dtype=torch.int64)]
    seen_scores = [torch.empty(functions, 0, dtype=torch.float64)]
    start = adjoint.norms()
    for segment in segments:
        if curvature:
            require_curvature(segment)
        seen_ids.append(segment.visit_ids)
        seen_scores.append(adjoint.through(segment))
    ids, positions = torch.unique(torch.cat(seen_ids), return_inverse=True)
    scores = torch.zeros(functions, len(ids), dtype=torch.float64)
    scores.index_add_(1, positions, torch.cat(seen_scores, dim=1))
    return Swept(ids, scores, torch.where(start == 0.0, 0.0, adjoint.norms() / start))


def norms(parts: Iterable[Tensor]) -> Tensor:
    """Euclidean norms of rows that lie spread over several tensors, fp64, shape ``(rows,)``."""
    return torch.stack([each.double().flatten(1).square().sum(1) for each in parts]).sum(0).sqrt()


def require_curvature(segment: Segment) -> None:
    """Raise ``NoCurvatureError`` where a visit of a segment has no curvature weight."""
    if bool(segment.curvature.isnan().any()):
        raise NoCurvatureError(
            "this ledger does not hold the curvature of every sample's loss, which is needed to follow later steps: "
            "the model's loss is no cross-entropy with one right class a row, its logits are not those of the layer "
            "given to record(output=), or the ledger is older; for such there is estimator='direct'"
        )


class Adjoint:
    """``λ`` and ``μ`` of every parameter and function, on their way back; arguments as for :func:`sweep`."""

    def __init__(self, layout: Layout, gradients: Mapping[int, Tensor], curvature: float) -> None:
        self._shapes: Sequence[tuple[int, ...]] = [info.shape for info in layout.parameters]
        self._streams = layout.streams_by_parameter(gradients)
        self._functions = len(next(iter(gradients.values())))
        self._of_parameters = {index: gradient.clone() for index, gradient in gradients.items()}
        self._of_momenta = {index: torch.zeros_like(gradient) for index, gradient in gradients.items()}
        self._curvature = curvature

    def norms(self) -> Tensor:
        """``‖λ‖`` over all parameters, fp64, shape ``(functions,)``."""
        return norms(self._of_parameters.values())

    def through(self, segment: Segment) -> Tensor:
        """Go back through a segment and score its visits: fp64, shape ``(functions, visits)``."""
        scores = torch.zeros(self._functions, len(segment.visit_ids), dtype=torch.float64)
        for step in reversed(range(segment.steps)):
            first_visit, end_visit = segment.visit_bounds[step : step + 2].tolist()
            inner = torch.zeros(self._functions, end_visit - first_visit)
            applied = {index: segment.step_scalars(step, index) for index in self._of_parameters}
            parts: list[tuple[int, Record]] = []
            for index, scalars in applied.items():
                if scalars is None:
                    continue
                stored = [tensor[step] for tensor in segment.preconditioners[index]]
                self._of_momenta[index].addcmul_(
                    unsmooth(stored, self._shapes[index]), self._of_parameters[index], value=-1.0
                )
                share = scalars.grad_weight * scalars.multiplier
                for stream in self._streams[index]:
                    if stream in segment.records:
                        record = segment.records[stream].between(first_visit, end_visit)
                        parts.append((index, record))
                        found = record.inner(self._of_momenta[index])
                        inner.index_add_(1, record.visit.long() - first_visit, found, alpha=share)
            scores[:, first_visit:end_visit] = -inner.double()
            for index, scalars in applied.items():
                if scalars is not None:
                    self._of_parameters[index].mul_(scalars.decay)
                    self._of_momenta[index].mul_(scalars.momentum)
            if self._curvature:
                inner *= self._curvature * segment.curvature[first_visit:end_visit]
                for index, record in parts:
                    record.add_to(self._of_parameters[index], inner[:, record.visit.long() - first_visit])
        return scores
