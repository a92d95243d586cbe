"""Whether explanations by a ledger can be believed: what recording kept, and whether it foretells retraining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.errors import LedgerError
from gradkern.loss import Batch, LossFn
from gradkern.rollback._datamodeling import datamodeling_score
from gradkern.rollback._estimators import Scores
from gradkern.rollback._replay import Replayer
from gradkern.rollback._retraining import retrain
from gradkern.rollback._verify import Check, Compression, VerifyReport, report_lines

__all__ = ["SelfTest", "choose_subsets", "require_sound", "run_self_test", "untested"]

# Models that are trained where nobody said how many: together, or one by one.
_TOGETHER, _ONE_BY_ONE, _FEWEST = 200, 25, 10

_NAME = "linear datamodeling score"


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What :meth:`Ledger.self_test` found; ``str(test)`` is a readable table.

    Attributes:
        checks: Those of :meth:`Ledger.verify`, ``"reconstruction"`` and ``"linear datamodeling score"``.
        cosine: Mean over layers of the mean cosine between exact gradients and records; None where none were compared.
        lds: The linear datamodeling score; None where it was not found.
        interval: Of 95 % around it, by the jackknife over subsets; None likewise.
        by_query: The rank correlation of every query, fp64, shape ``(queries,)``; None likewise.
        compression: As that of :class:`VerifyReport`.
        subsets: Models that were trained again.
        together: Whether they were trained in stacks; False: one by one.
    """

    checks: tuple[Check, ...]
    cosine: float | None
    lds: float | None = None
    interval: tuple[float, float] | None = None
    by_query: Tensor | None = None
    subsets: int = 0
    together: bool = False
    compression: tuple[Compression, ...] = ()

    @property
    def passed(self) -> bool:
        """True only if every check could be run and held."""
        return all(check.passed is True for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(report_lines("ledger self-test", self.passed, self.checks))


def require_sound(queries: object, subsets: int | None, share: float) -> None:
    """Raise ``ValueError`` where there are no queries, too few subsets, or ``share`` is not in (0, 1)."""
    if not isinstance(queries, list) or not queries:
        got = "an empty list" if isinstance(queries, list) else type(queries).__name__
        raise ValueError(f"self_test: queries must be a list of at least one batch, got {got}")
    if subsets is not None and subsets < _FEWEST:
        raise ValueError(f"self_test: subsets must be at least {_FEWEST}, got {subsets}")
    if not 0.0 < share < 1.0:
        raise ValueError(f"self_test: share must be above 0 and below 1, got {share}")


def choose_subsets(samples: int, subsets: int | None, share: float, seed: int) -> Tensor:
    """Draw the samples that each model does without: bool, shape ``(subsets, samples)``, equally many in each row.

    Raises:
        ValueError: There are fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"self_test: leaving samples out takes at least two, the ledger has {samples}")
    count = min(max(1, round(share * samples)), samples - 1)
    subsets = _TOGETHER if subsets is None else subsets
    order = torch.rand(subsets, samples, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return torch.zeros(subsets, samples, dtype=torch.bool).scatter_(1, order[:, :count], value=True)


def untested(report: VerifyReport, least_cosine: float, least_lds: float, why: str, passed: bool | None) -> SelfTest:
    """The report where no model was trained."""
    cosines = _reconstruction(report, least_cosine)
    checks = (*report.checks, cosines, Check(_NAME, passed, None, None, why, least_lds))
    return SelfTest(checks, cosines.value, compression=report.compression)


def run_self_test(
    report: VerifyReport,
    least_cosine: float,
    least_lds: float,
    scores: Scores,
    left_out: Tensor,
    subsets: int | None,
    replayer: Replayer,
    queries: list[Batch],
    loss_fn: LossFn | None,
    progress: Callable[[int, int], None],
) -> SelfTest:
    """Train without samples and judge scores by it; see :meth:`gradkern.rollback.Ledger.self_test`.

    Args:
        report: Of the ledger's verification.
        least_cosine: See there, as what is not explained here.
        least_lds: See there.
        scores: Of the queries.
        left_out: The samples that each model does without, shape ``(subsets, samples)``.
        subsets: See there.
        replayer: Of the training.
        queries: See there.
        loss_fn: Of the queries.
        progress: See there.
    """
    if not bool(scores.scores.isfinite().all()):
        return untested(report, least_cosine, least_lds, "scores are not finite", passed=False)
    fewer = _ONE_BY_ONE if subsets is None else subsets
    try:
        retrained = retrain(replayer, scores.ids, left_out, fewer, queries, loss_fn, progress)
    except LedgerError:
        raise
    except Exception as error:
        raise ValueError(
            f"self_test: the training failed without some samples ({error}); of some micro-batches few rows are left: "
            f"pass a smaller share than the one that left out {int(left_out[0].sum())} of {left_out.shape[1]} samples"
        ) from error
    models = len(retrained.losses)
    how = (
        f"trained one by one, because {retrained.why}"
        if retrained.why is not None
        else f"trained together, {retrained.apart:.1g} of the change of losses from exact retraining"
    )
    bad = int((~retrained.losses.isfinite()).any(dim=1).sum())
    if bad:
        why = f"{bad} of {models} models have a loss that is not finite; {how}"
        return untested(report, least_cosine, least_lds, why, None)
    found = datamodeling_score(scores.scores, left_out[:models], retrained.losses)
    low, high = found.interval
    detail = (
        f"95 % interval {low:.3f} to {high:.3f}, whose lower end counts; {len(queries)} queries, {models} models "
        f"without {int(left_out[0].sum())} of {left_out.shape[1]} samples each, {how}"
    )
    cosines = _reconstruction(report, least_cosine)
    verdict = Check(_NAME, low >= least_lds, found.value, None, detail, least_lds)
    return SelfTest(
        (*report.checks, cosines, verdict),
        cosines.value,
        found.value,
        found.interval,
        found.by_query,
        models,
        retrained.why is None,
        report.compression,
    )


def _reconstruction(report: VerifyReport, least: float) -> Check:
    """Judge how well records stand for exact gradients."""
    if not report.compression:
        return Check("reconstruction", None, None, None, "no record was compared with an exact gradient", least)
    worst = min(report.compression, key=lambda entry: entry.cosine)
    mean = sum(entry.cosine for entry in report.compression) / len(report.compression)
    detail = (
        f"mean cosine of record and exact gradient over {len(report.compression)} streams, worst {worst.cosine:.3f} at "
        f"{worst.layer} ({worst.parameter})"
    )
    return Check("reconstruction", mean >= least, mean, None, detail, least)
