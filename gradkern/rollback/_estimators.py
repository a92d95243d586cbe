"""How influence is estimated: by what name, from what, and when the answer is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from gradkern.errors import UnstableInfluenceError
from gradkern.loss import Batch, LossFn, compute_loss
from gradkern.rollback._deltas import read_deltas
from gradkern.rollback._gauss_newton import GaussNewton
from gradkern.rollback._metagradient import metagradient
from gradkern.rollback._reading import read_segments
from gradkern.rollback._replay import Replay, Replayer
from gradkern.rollback._store import StoreReader
from gradkern.rollback._subtraction import subtract_each
from gradkern.rollback._sweep import EmpiricalFisher, NoCurvatureError, sweep
from gradkern.rollback._trajectory import Trajectory

__all__ = ["Influence", "Scores", "needs_replay", "query_gradients", "require_estimator", "score"]

# Of the estimators that sweep, the share of the curvature that later steps are taken to have reacted with, by mode.
_CURVATURE = {("direct", "run"): 0.0, ("ref", "run"): 1.0, ("ref", "expected"): 0.5}

# Those that run the training again.
_BY_REPLAY = (("gauss_newton", "run"), ("metagradient", "run"))
_KNOWN = (*_CURVATURE, ("paper", "run"), *_BY_REPLAY)

# Of influence on its way back to the first step. It fades in a sound run, to a tenth in a few hundred steps, and stays
# where it is in a run of a few; where the estimator fails it grows twentyfold and more.
_MOST_GROWTH = 1.25


@dataclass(frozen=True, slots=True)
class Influence:
    """The influence of one training sample on a query.

    Attributes:
        id: The sample's id, as given to ``recorder.batch``.
        score: How much the query's loss would rise without the sample, in units of the loss; positive = it helped.
        error: Standard error of the score, as :attr:`Scores.errors`; NaN where there is none.
    """

    id: int
    score: float
    error: float = math.nan


@dataclass(frozen=True, slots=True)
class Scores:
    """The influence of every recorded sample on a query, or on each of several.

    Attributes:
        ids: Different sample ids, ascending, int64, shape ``(samples,)``.
        scores: As :attr:`Influence.score`, fp64, shape ``(samples,)``; ``(queries, samples)`` for a list of queries.
        errors: Standard errors of the scores, of the same shape: a score is a sum over the sample's visits, and this is
            how far such sums scatter when its visits are drawn anew from those that it had, a bootstrap in closed form:
            ``sqrt(n / (n - 1) * Σ (c - mean(c))²)`` for visits that added ``c``. It says whether a score rests on few
            of its visits. It does not say what other training seeds would give (see :func:`mean_over_runs`), nor how
            far the estimator is from retraining (see :meth:`Ledger.self_test`), and a steady trend over training, a
            falling learning rate say, counts as scatter. NaN for a sample that was visited once, whose visits say
            nothing about one another; None where visits are not told apart (``"paper"``, a finished ledger).
    """

    ids: torch.Tensor
    scores: torch.Tensor
    errors: torch.Tensor | None = None


def score(
    store: StoreReader,
    model: nn.Module,
    queries: list[Batch],
    loss_fn: LossFn | None,
    estimator: str | None,
    mode: str,
    replay: Replay | None,
) -> Scores:
    """Score every recorded sample for each query; see :meth:`gradkern.rollback.Ledger.explain`.

    Three calls below the user's, so that warnings point at the line that asked.
    """
    asked_for = "ref" if estimator is None else estimator
    require_estimator(asked_for, mode, replay)
    if replay is not None:
        replayer = Replayer(store, model, replay, otherwise="estimator='ref' or 'direct'")
        return _score_by_replay(store, model, queries, loss_fn, asked_for, replayer)
    layout = store.layout
    owned = layout.owned(layout.trained_parameters(model))
    if asked_for == "paper":
        return _subtracted(store, model, owned, queries, loss_fn)
    gradients = _stacked_gradients(model, owned, queries, loss_fn)
    share = _CURVATURE[asked_for, mode]
    curvature = EmpiricalFisher(share) if share else None
    try:
        found = sweep(layout, gradients, read_segments(store, backwards=True), curvature)
    except NoCurvatureError as error:
        if estimator is not None or mode != "run":
            raise
        warnings.warn(f"{error}, whose scores these are", stacklevel=4)
        share = _CURVATURE["direct", mode]
        found = sweep(layout, gradients, read_segments(store, backwards=True), None)
    if share:
        _require_fading(found.growth, asked_for)
    return Scores(found.ids, found.scores, found.errors)


def require_estimator(estimator: str, mode: str, replay: Replay | None) -> None:
    """Raise ``ValueError`` where there is no such estimator, or not in this mode, or not with what was given."""
    if (estimator, mode) not in _KNOWN:
        known = ", ".join(f"estimator={each!r} with mode={other!r}" for each, other in _KNOWN)
        raise ValueError(f"there are {known}; got estimator={estimator!r} with mode={mode!r}")
    by_replay = needs_replay(estimator, mode)
    if by_replay and replay is None:
        raise ValueError(
            f"estimator={estimator!r} runs the training again and needs replay=Replay(fetch, make_optimizer, loss_fn), "
            f"got None; estimator='ref' and 'direct' need none"
        )
    if replay is not None and not by_replay:
        raise ValueError(
            f"estimator={estimator!r} does not run the training again, got replay=; leave it away, or ask for "
            f"estimator='gauss_newton' or 'metagradient'"
        )


def needs_replay(estimator: str | None, mode: str) -> bool:
    """Whether an estimator runs the training again."""
    return (estimator, mode) in _BY_REPLAY


def _score_by_replay(
    store: StoreReader,
    model: nn.Module,
    queries: list[Batch],
    loss_fn: LossFn | None,
    estimator: str,
    replayer: Replayer,
) -> Scores:
    layout = store.layout
    trained = layout.trained_parameters(model)
    if estimator == "metagradient":
        gradients = _stacked_gradients(model, dict(enumerate(trained)), queries, loss_fn)
        named = {layout.parameters[index].name: each for index, each in gradients.items()}
        return Scores(*metagradient(model, named, replayer))
    gradients = _stacked_gradients(model, layout.owned(trained), queries, loss_fn)
    curvature = GaussNewton(layout, Trajectory(replayer))
    found = sweep(layout, gradients, read_segments(store, backwards=True), curvature)
    _require_fading(found.growth, estimator)
    return Scores(found.ids, found.scores, found.errors)


def _stacked_gradients(
    model: nn.Module, parameters: dict[int, nn.Parameter], queries: list[Batch], loss_fn: LossFn | None
) -> dict[int, torch.Tensor]:
    """Gradients of all queries, by parameter, shape ``(queries, *parameter)``."""
    each = [query_gradients(model, parameters, query, loss_fn) for query in queries]
    return {index: torch.stack([gradient.pop(index) for gradient in each]) for index in parameters}


def _subtracted(
    store: StoreReader,
    model: nn.Module,
    owned: dict[int, nn.Parameter],
    queries: list[Batch],
    loss_fn: LossFn | None,
) -> Scores:
    """Scores by taking every sample's delta off."""
    named = {store.layout.parameters[index].name: (index, parameter) for index, parameter in owned.items()}
    with _eval_mode(model), torch.no_grad():
        return Scores(*subtract_each(model, named, queries, loss_fn, read_deltas(store)))


def query_gradients(
    model: nn.Module, owned: dict[int, nn.Parameter], query: Batch, loss_fn: LossFn | None
) -> dict[int, torch.Tensor]:
    """Gradient of the query's loss by parameter, in host memory; zero where it does not depend on one."""
    with _eval_mode(model), torch.enable_grad():
        loss = compute_loss(model, query, loss_fn)
        gradients = torch.autograd.grad(loss, list(owned.values()), allow_unused=True) if loss.requires_grad else ()
    if not any(gradient is not None for gradient in gradients):
        raise ValueError(
            "the query's loss depends on no recorded parameter, so no sample can have influenced it; pass a loss that "
            "is computed from the model's output, with gradients enabled"
        )
    return {
        index: torch.zeros(parameter.shape) if gradient is None else gradient.detach().cpu().contiguous()
        for (index, parameter), gradient in zip(owned.items(), gradients, strict=True)
    }


def _require_fading(growth: torch.Tensor, estimator: str) -> None:
    """Raise where influence got larger on its way back."""
    failed = ~(growth <= _MOST_GROWTH)
    if bool(failed.any()):
        raise UnstableInfluenceError(
            f"influence grew {float(growth[failed].nan_to_num(torch.inf).max()):.3g}-fold on its way from the last "
            f"step to the first ({int(failed.sum())} of {len(growth)} queries; it should fade), so that scores of "
            f"estimator={estimator!r} would be noise: steps were too large for the curvature of the loss. Use "
            "estimator='direct', or record a run with a smaller learning rate",
            growth=tuple(growth.tolist()),
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and each module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
