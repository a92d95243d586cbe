"""Influence by one pass backwards in time over the ledger, of any number of functions of the parameters at once.

A step is, of every parameter, ``M_t = momentum M_{t-1} + share g_t`` and ``θ_t = decay θ_{t-1} - P_t ⊙ M_t``, where
``share`` is the gradient's weight times the clip coefficient. Let ``λ`` be what a function gains by a change of ``θ_t``
and ``μ`` what it gains by one of ``M_t``. From the last step to the first,

    μ ← μ - P_t ⊙ λ,    u = share μ,    score_i ← score_i - ⟨u, g_{i,t}⟩,    λ ← decay λ + H_t u,    μ ← momentum μ,

for the gradient that a step used was taken at the parameters before it, and its change there is ``H_t`` times theirs.

Estimators differ in ``H``. ``direct`` takes ``H = 0``: what each sample's own steps did, and not how later ones
reacted. ``ref`` takes the reweighted empirical Fisher matrix ``H_t = Σ_i w_i g_i g_iᵀ`` over the samples of the step,
of which the records hold all there is; the weights are those of :mod:`gradkern.rollback._curvature`. ``gauss_newton``
takes the matrix of that name, see :mod:`gradkern.rollback._gauss_newton`. ``P`` is the smoothed preconditioner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from gradkern.errors import LedgerError
from gradkern.rollback._layout import Layout
from gradkern.rollback._records import Record
from gradkern.rollback._segment import Segment, StepScalars
from gradkern.rollback._smoothing import unsmooth

__all__ = [
    "Adjoint",
    "Curvature",
    "EmpiricalFisher",
    "NoCurvatureError",
    "StepBack",
    "Swept",
    "collect_scores",
    "norms",
    "require_curvature",
    "sweep",
]


class NoCurvatureError(LedgerError):
    """A ledger lacks the curvature of a sample's loss."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found.

    Attributes:
        ids: The different sample ids, ascending, int64, shape ``(samples,)``.
        scores: How much each function would rise had a sample's steps not been taken, fp64, shape
            ``(functions, samples)``.
        errors: Of the scores, see :func:`collect_scores`.
        growth: ``‖λ‖`` at the first step over that at the last, shape ``(functions,)``, well above 1 where the sweep
            has gone wild; 0 for a function without a gradient.
    """

    ids: Tensor
    scores: Tensor
    errors: Tensor
    growth: Tensor


@dataclass(frozen=True, slots=True)
class StepBack:
    """A step that a sweep is going back through.

    Attributes:
        curvature_weights: Of every visit, fp32, shape ``(visits,)``; NaN where it is not known.
        records: Of the step's visits, counted from the first of them, with the parameter each belongs to.
        inner: ``⟨u, g_i⟩``, fp32, shape ``(functions, visits)``.
        directions: ``u`` by parameter, shape ``(functions, *parameter)``, computed when asked for; of parameters that
            the step changed.
    """

    curvature_weights: Tensor
    records: Sequence[tuple[int, Record]]
    inner: Tensor
    directions: Callable[[], dict[int, Tensor]]


class Curvature(Protocol):
    """``H`` of every step, asked for from the last step to the first."""

    def add_product(self, step: StepBack, sums: Mapping[int, Tensor]) -> None:
        """Add ``H_t u`` to ``sums``, by parameter, shape ``(functions, *parameter)``."""


class EmpiricalFisher:
    """The reweighted empirical Fisher matrix of the recorded gradients.

    Args:
        share: Its factor.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def add_product(self, step: StepBack, sums: Mapping[int, Tensor]) -> None:
        """See :meth:`Curvature.add_product`.

        Raises:
            NoCurvatureError: A visit has no curvature weight.
        """
        require_curvature(step.curvature_weights)
        coefficients = step.inner * (self._share * step.curvature_weights)
        for index, record in step.records:
            record.add_to(sums[index], coefficients[:, record.visit.long()])


def sweep(
    layout: Layout, gradients: Mapping[int, Tensor], segments: Iterator[Segment], curvature: Curvature | None
) -> Swept:
    """Score every sample in a ledger.

    Args:
        layout: The ledger's layout.
        gradients: Gradients of the functions by owned parameter, fp32, in host memory, shape
            ``(functions, *parameter)``.
        segments: From the last to the first; only one is held at a time.
        curvature: Of the steps; None leaves it out.

    Raises:
        NoCurvatureError: ``curvature`` needs a weight that a visit does not have.
    """
    adjoint = Adjoint(layout, gradients, curvature)
    start = adjoint.norms()
    visits = [(segment.visit_ids, adjoint.through(segment)) for segment in segments]
    return Swept(*collect_scores(visits, len(start)), torch.where(start == 0.0, 0.0, adjoint.norms() / start))


def collect_scores(visits: Sequence[tuple[Tensor, Tensor]], functions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the scores of visits by sample.

    With ``c`` the scores of a sample's ``n`` visits, the error is ``sqrt(n / (n - 1) * Σ (c - mean(c))²)``. Drawing
    ``n`` of them with replacement, again and again, gives sums whose standard deviation tends to the root of
    ``Σ (c - mean(c))²`` exactly; the factor makes up for the mean having been taken of the same few visits (Efron and
    Tibshirani, "An introduction to the bootstrap", 1993).

    Args:
        visits: Sample ids, shape ``(n,)``, with scores of shape ``(functions, n)``, fp64.
        functions: Their number.

    Returns:
        The different ids, ascending, the scores of each, shape ``(functions, samples)``, and their errors, likewise;
        NaN for a sample that was visited once.
    """
    all_ids = torch.cat([torch.empty(0, dtype=torch.int64), *(ids for ids, _ in visits)])
    all_scores = torch.cat([torch.empty(functions, 0, dtype=torch.float64), *(scores for _, scores in visits)], dim=1)
    ids, positions, counts = torch.unique(all_ids, return_inverse=True, return_counts=True)
    scores = torch.zeros(functions, len(ids), dtype=torch.float64).index_add_(1, positions, all_scores)
    squares = torch.zeros_like(scores).index_add_(1, positions, all_scores.square_())
    # What cancels here is below the rounding of the visits' scores, which were fp32.
    spread = (counts * squares - scores.square()).clamp_min_(0.0)
    return ids, scores, (spread / (counts - 1)).sqrt_()


def norms(parts: Iterable[Tensor]) -> Tensor:
    """Euclidean norms of rows that lie spread over several tensors, fp64, shape ``(rows,)``."""
    return torch.stack([each.double().flatten(1).square().sum(1) for each in parts]).sum(0).sqrt()


def require_curvature(weights: Tensor) -> None:
    """Raise ``NoCurvatureError`` where a visit has no curvature weight."""
    if bool(weights.isnan().any()):
        raise NoCurvatureError(
            "this ledger does not hold the curvature of every sample's loss, which is needed to follow later steps: "
            "the model's loss is no cross-entropy with one right class a row, its logits are not those of the layer "
            "given to record(output=), the loss was scaled by another number than twice or half of that before where "
            "every row was fitted, or the ledger is older; for such there is estimator='direct'"
        )


class Adjoint:
    """``λ`` and ``μ`` of every parameter and function, on their way back; arguments as for :func:`sweep`."""

    def __init__(self, layout: Layout, gradients: Mapping[int, Tensor], curvature: Curvature | None) -> None:
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
            parts: list[tuple[int, Record]] = []
            shares: dict[int, float] = {}
            applied = self._applied(segment, step)
            for index, scalars in applied.items():
                stored = [tensor[step] for tensor in segment.preconditioners[index]]
                self._of_momenta[index].addcmul_(
                    unsmooth(stored, self._shapes[index]), self._of_parameters[index], value=-1.0
                )
                shares[index] = scalars.grad_weight * scalars.multiplier
                for stream in self._streams[index]:
                    if stream in segment.records:
                        record = segment.records[stream].between(first_visit, end_visit)
                        parts.append((index, replace(record, visit=record.visit - first_visit)))
                        found = record.inner(self._of_momenta[index])
                        inner.index_add_(1, parts[-1][1].visit.long(), found, alpha=shares[index])
            scores[:, first_visit:end_visit] = -inner.double()
            for index, scalars in applied.items():
                self._of_parameters[index].mul_(scalars.decay)
            if self._curvature is not None:
                weights = segment.curvature[first_visit:end_visit]
                back = StepBack(weights, parts, inner, partial(self._directions, shares))
                self._curvature.add_product(back, self._of_parameters)
            for index, scalars in applied.items():
                self._of_momenta[index].mul_(scalars.momentum)
        return scores

    def _applied(self, segment: Segment, step: int) -> dict[int, StepScalars]:
        """What a step applied to the parameters that it changed."""
        applied = {index: segment.step_scalars(step, index) for index in self._of_parameters}
        return {index: scalars for index, scalars in applied.items() if scalars is not None}

    def _directions(self, shares: Mapping[int, float]) -> dict[int, Tensor]:
        return {index: self._of_momenta[index] * share for index, share in shares.items()}
