"""Influence by subtraction: what a loss becomes when a sample's delta is taken off the parameters.

The estimator of Lawrence, Sztyler and Niepert, "Explaining neural matrix factorization with gradient rollback", 2021:

    score_i = loss(θ_T - D_i) - loss(θ_T).

The loss is evaluated anew for every sample, so the change need not be small and the loss need not have a gradient. The
paper takes for ``D_i`` how far a batch of one moved the rows of its own triple; here it is the sample's exact part of
what training did (:mod:`gradkern.rollback._deltas`): for batches of any size, with momentum, in all rows it touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gradkern.errors import UnstableInfluenceError
from gradkern.loss import Batch, LossFn, compute_loss
from gradkern.rollback._deltas import Deltas

__all__ = ["StackedLosses", "subtract_each"]

# Models that are evaluated at a time: by their parameters, and at most so many, for activations are not counted.
_MODELS_BYTES = 1 << 26
_MOST_MODELS = 256

_Parameters = Mapping[str, Tensor]


def subtract_each(
    model: nn.Module,
    owned: Mapping[str, tuple[int, Tensor]],
    queries: list[Batch],
    loss_fn: LossFn | None,
    chunks: Iterator[Deltas],
) -> tuple[Tensor, Tensor]:
    """Score every sample for every query.

    Args:
        model: In eval mode; left as it is.
        owned: The parameters to subtract from, by name, each with its index in the layout.
        queries: As in :func:`gradkern.loss.compute_loss`.
        loss_fn: See there.
        chunks: The deltas.

    Returns:
        ``(ids, scores)``: int64 of shape ``(samples,)``, and fp64 of shape ``(queries, samples)``.

    Raises:
        UnstableInfluenceError: A loss is not finite.
    """
    losses = [StackedLosses(model, query, loss_fn) for query in queries]
    size = sum(parameter.nbytes for _, parameter in owned.values())
    at_once = max(1, min(_MOST_MODELS, _MODELS_BYTES // max(1, size)))
    ids = [torch.empty(0, dtype=torch.int64)]
    scores = [torch.empty(len(queries), 0, dtype=torch.float64)]
    for chunk in chunks:
        ids.append(chunk.ids)
        for first in range(0, len(chunk.ids), at_once):
            deltas = chunk.dense(first, min(first + at_once, len(chunk.ids)))
            # In front the parameters themselves: evaluated in the same way, so that rounding is no influence.
            edited = {
                name: torch.cat([parameter[None], parameter - deltas[index].to(parameter.device)])
                for name, (index, parameter) in owned.items()
            }
            found = torch.stack([each(edited) for each in losses])
            scores.append(found[:, 1:] - found[:, :1])
    result = torch.cat(scores, dim=1)
    _require_finite(result)
    return torch.cat(ids), result


class StackedLosses:
    """The losses that a model has on a query with several sets of parameters."""

    def __init__(self, model: nn.Module, query: Batch, loss_fn: LossFn | None) -> None:
        def loss(parameters: _Parameters) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model, dict(parameters), args, kwargs)

            return compute_loss(call, query, loss_fn).reshape(())

        self._loss: Callable[[_Parameters], Tensor] = loss
        self._is_batchable = True

    def __call__(self, stacked: _Parameters) -> Tensor:
        """fp64 in host memory, shape ``(sets,)``; each of ``stacked`` has a first dimension for them."""
        if self._is_batchable:
            try:
                return vmap(self._loss)(stacked).double().cpu()
            except RuntimeError:
                # Models that look at values, to branch or to log, cannot be batched; other errors come up again below.
                self._is_batchable = False
        sets = len(next(iter(stacked.values())))
        each = ({name: values[number] for name, values in stacked.items()} for number in range(sets))
        return torch.stack([self._loss(parameters).double().cpu() for parameters in each])


def _require_finite(scores: Tensor) -> None:
    """A NaN would rank first in every explanation."""
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        raise UnstableInfluenceError(
            f"without a sample's delta the loss is not finite ({int(bad.sum())} of {bad.numel()} scores of "
            f"estimator='paper'): the deltas are too large to subtract. Use estimator='ref' or 'direct', or record a "
            f"run with a smaller learning rate",
            growth=tuple(torch.where(bad.any(dim=1), torch.nan, 0.0).tolist()),
        )
