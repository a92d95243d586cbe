"""The ``direct`` estimator: what each sample's own recorded steps did to a scalar function of the parameters.

Unrolling the step's recursion, the change that sample ``i`` caused is

    D_i = -sum_t grad_weight_t * c_t * A_t ⊙ g_{i,t},    A_t = P_t * W_t + momentum_{t+1} * A_{t+1},

with ``W_t`` the product of the decays after step ``t``. ``A_t`` is shared by all samples, so one pass
backwards in time over the ledger scores all of them: without sample ``i`` the function rises, to first order,
by ``-⟨gradient, D_i⟩``. ``P`` is the smoothed preconditioner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from gradkern.rollback._layout import Layout
from gradkern.rollback._segment import Segment
from gradkern.rollback._smoothing import unsmooth

__all__ = ["direct_scores"]


def direct_scores(
    layout: Layout, gradients: Mapping[int, torch.Tensor], segments: Iterator[Segment]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every sample in a ledger.

    Args:
        layout: The ledger's layout.
        gradients: Gradient of the function by owned parameter, fp32, in host memory.
        segments: From the last to the first; only one is held at a time.

    Returns:
        ``(ids, scores)``: the different sample ids, ascending, int64, and for each how much the function
        would rise had its recorded steps not been taken, fp64. Both of shape ``(samples,)``.
    """
    sweep = _Sweep(layout, gradients)
    seen_ids: list[torch.Tensor] = []
    seen_scores: list[torch.Tensor] = []
    for segment in segments:
        seen_ids.append(segment.visit_ids)
        seen_scores.append(sweep.score(segment))
    if not seen_ids:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    ids, positions = torch.unique(torch.cat(seen_ids), return_inverse=True)
    scores = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, positions, torch.cat(seen_scores))
    return ids, scores


class _Sweep:
    """Carries ``gradient ⊙ A_t`` of every parameter backwards in time."""

    def __init__(self, layout: Layout, gradients: Mapping[int, torch.Tensor]) -> None:
        self._shapes: Sequence[tuple[int, ...]] = [info.shape for info in layout.parameters]
        self._streams: dict[int, list[int]] = {index: [] for index in gradients}
        for stream, source in enumerate(layout.streams):
            self._streams[source.parameter].append(stream)
        self._gradients = gradients
        self._weighted = {index: torch.zeros_like(gradient) for index, gradient in gradients.items()}
        self._later_momentum = dict.fromkeys(gradients, 0.0)
        self._later_decay = dict.fromkeys(gradients, 1.0)

    def score(self, segment: Segment) -> torch.Tensor:
        """Score a segment's visits: shape ``(visits,)``, fp64. Segments come from the last to the first."""
        scores = torch.zeros(len(segment.visit_ids), dtype=torch.float64)
        for step in reversed(range(segment.steps)):
            first_visit, end_visit = segment.visit_bounds[step : step + 2].tolist()
            for index, weighted in self._weighted.items():
                scalars = segment.step_scalars(step, index)
                if scalars is None:
                    continue
                stored = [tensor[step] for tensor in segment.preconditioners[index]]
                step_size = unsmooth(stored, self._shapes[index]).mul_(self._gradients[index])
                weighted.mul_(self._later_momentum[index]).add_(step_size, alpha=self._later_decay[index])
                self._later_momentum[index] = scalars.momentum
                self._later_decay[index] *= scalars.decay
                share = scalars.grad_weight * scalars.multiplier
                for stream in self._streams[index]:
                    if stream in segment.records:
                        record = segment.records[stream].between(first_visit, end_visit)
                        scores.index_add_(0, record.visit.long(), share * record.inner(weighted).double())
        return scores
