"""The losses of models that were trained again without some samples: many at a time where that works, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradkern.loss import Batch, LossFn, compute_loss
from gradkern.rollback._replay import Replayer
from gradkern.rollback._stacked_step import UnstackableError
from gradkern.rollback._stacked_training import StackedTraining, bytes_of_copy

__all__ = ["Retrained", "retrain"]

# Of copies that are trained together.
_STACK_BYTES = 1 << 28

# Between the losses of a copy and of exact retraining, relative to what leaving its samples out changed. Not between
# parameters: some may wander without effect, as a bias before a BatchNorm does, whose gradient is rounding alone.
_MOST_APART = 0.05


@dataclass(frozen=True, slots=True)
class Retrained:
    """Models trained without some samples.

    Attributes:
        losses: On every query, in eval mode, fp64, shape ``(models, queries)``.
        apart: Where they were trained together: how far the losses of the first are from those of exact retraining,
            relative to how far these are from those of the whole training, by the 2-norm over queries. None where they
            were trained one by one.
        why: They were trained one by one; None where they were not.
    """

    losses: Tensor
    apart: float | None
    why: str | None


def retrain(
    replayer: Replayer,
    ids: Tensor,
    left_out: Tensor,
    fewer: int,
    queries: Sequence[Batch],
    loss_fn: LossFn | None,
    progress: Callable[[int, int], None],
) -> Retrained:
    """Train again without some samples, as :meth:`gradkern.rollback.Ledger.undo` does.

    Args:
        replayer: Of the training, which is run once as it was and compared with the ledger before anything else.
        ids: Of all samples, ascending, shape ``(samples,)``.
        left_out: Which samples each model does without, bool, shape ``(models, samples)``.
        fewer: If they are trained one by one, only so many, the first of them.
        queries: To evaluate.
        loss_fn: Of the queries.
        progress: Called with the number of steps made and of all; the latter changes once it is known whether models
            can be trained together.

    Raises:
        LedgerError: The ledger was recorded without ``replayable=True``, or the training gives something else.
    """
    steps = _Steps(progress, replayer.steps)
    steps.expect(3)
    whole = _losses(replayer.check(steps.told).model, queries, loss_fn)
    exact = _losses(replayer.train(ids[left_out[0]], steps.told), queries, loss_fn)
    try:
        with replayer.as_recorded():
            size = bytes_of_copy(replayer.begin(), next(iter(replayer.logged())))
        stacks = list(left_out.split(max(1, _STACK_BYTES // max(1, size))))
        steps.expect(len(stacks))
        losses: list[Tensor] = []
        for stack in stacks:
            losses.append(_train_stack(replayer, ids, stack, steps).losses(queries, loss_fn))
            apart = _apart(whole, exact, losses[0][0])
        return Retrained(torch.cat(losses), apart, None)
    except UnstackableError as error:
        why = str(error)
    steps.expect(min(fewer, len(left_out)) - 1)
    others = (replayer.train(ids[each], steps.told) for each in left_out[1:fewer])
    return Retrained(torch.stack([exact, *(_losses(each, queries, loss_fn) for each in others)]), None, why)


def _train_stack(replayer: Replayer, ids: Tensor, left_out: Tensor, steps: _Steps) -> StackedTraining:
    copies = StackedTraining(replayer.begin(), ids, left_out)
    with replayer.as_recorded():
        for step in replayer.logged():
            copies.make(step)
            steps.told()
    return copies


def _apart(whole: Tensor, exact: Tensor, copy: Tensor) -> float:
    """See :attr:`Retrained.apart`.

    Raises:
        UnstackableError: Too far.
    """
    changed, off = (float(torch.linalg.vector_norm(exact - each)) for each in (whole, copy))
    apart = off / changed if changed else off
    if not apart <= _MOST_APART:
        raise UnstackableError(
            f"a model that was trained together with others had losses {apart:.2g} of their change from those of exact "
            f"retraining, more than {_MOST_APART}"
        )
    return apart


def _losses(model: nn.Module, queries: Sequence[Batch], loss_fn: LossFn | None) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.stack([compute_loss(model, query, loss_fn).double().reshape(()) for query in queries])


class _Steps:
    """Counts steps for whoever asked for progress."""

    def __init__(self, progress: Callable[[int, int], None], steps: int) -> None:
        self._progress, self._steps = progress, steps
        self._made = self._total = 0

    def expect(self, trainings: int) -> None:
        """So many trainings are still to come."""
        self._total = self._made + trainings * self._steps

    def told(self, *_: int) -> None:
        """A step was made."""
        self._made += 1
        self._progress(self._made, self._total)
