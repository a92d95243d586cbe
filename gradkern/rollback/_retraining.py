"""The losses of models that were trained again without some samples: many at a time where that works, or one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradkern.loss import Batch, LossFn, compute_loss
from gradkern.rollback._replay import Replayer, Training
from gradkern.rollback._stacked_step import UnstackableError
from gradkern.rollback._stacked_training import StackedTraining, bytes_of_copy

__all__ = ["Retrained", "retrain"]

# Of copies that are trained together.
_STACK_BYTES = 1 << 28

# Between a copy and the exact retraining, relative to what leaving its samples out changed.
_MOST_APART = 0.05


@dataclass(frozen=True, slots=True)
class Retrained:
    """Models trained without some samples.

    Attributes:
        losses: On every query, in eval mode, fp64, shape ``(models, queries)``.
        apart: Where they were trained together: how far the parameters of the first ended from those of exact
            retraining, relative to how far that ended from the whole training. None where they were trained one by one.
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
    stacks = [left_out]
    steps.expect(2 + len(stacks))
    whole = replayer.check(steps.told)
    exact = replayer.train(ids[left_out[0]], steps.told)
    try:
        with replayer.as_recorded():
            size = bytes_of_copy(replayer.begin(), next(iter(replayer.logged())))
        stacks = list(left_out.split(max(1, _STACK_BYTES // max(1, size))))
        steps.expect(len(stacks))
        losses = []
        apart = 0.0
        for number, stack in enumerate(stacks):
            copies = _train_stack(replayer, whole, ids, stack, steps)
            if number == 0:
                apart = _apart(whole.model, exact, copies.parameters(0))
            losses.append(copies.losses(queries, loss_fn))
        return Retrained(torch.cat(losses), apart, None)
    except UnstackableError as error:
        why = str(error)
    steps.expect(min(fewer, len(left_out)) - 1)
    others = (replayer.train(ids[each], steps.told) for each in left_out[1:fewer])
    found = [_losses(each, queries, loss_fn) for each in itertools.chain([exact], others)]
    return Retrained(torch.stack(found), None, why)


def _train_stack(replayer: Replayer, whole: Training, ids: Tensor, left_out: Tensor, steps: _Steps) -> StackedTraining:
    copies = StackedTraining(replayer.begin(), whole, ids, left_out)
    with replayer.as_recorded():
        for step in replayer.logged():
            copies.make(step)
            steps.told()
    return copies


def _apart(whole: nn.Module, exact: nn.Module, copy: dict[str, Tensor]) -> float:
    """See :attr:`Retrained.apart`.

    Raises:
        UnstackableError: Too far.
    """
    changed, off = 0.0, 0.0
    before, after = dict(whole.named_parameters()), dict(exact.named_parameters())
    for name, each in copy.items():
        changed += float((after[name] - before[name]).detach().double().square().sum())
        off += float((after[name].detach() - each).double().square().sum())
    apart = (off / changed) ** 0.5 if changed else float(off > 0.0)
    if not apart <= _MOST_APART:
        raise UnstackableError(
            f"models that were trained together ended {apart:.2g} of the way from exact retraining, more than "
            f"{_MOST_APART}"
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
