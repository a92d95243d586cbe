"""Influence over several runs: what is common to trainings with other seeds, and how far they scatter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradkern.rollback._estimators import Scores

__all__ = ["mean_over_runs"]


def mean_over_runs(runs: Sequence[Scores]) -> Scores:
    """Average scores of the same query over runs with other seeds.

    Args:
        runs: At least two, of ledgers of runs that differ in nothing but their seeds: ``ledger.scores(model, query,
            mode="expected")`` of each, with its own model. In a run that never visited it a sample scores 0.

    Returns:
        Of every sample of any run the mean score, with its standard error over seeds:
        ``sqrt(Σ (s - mean(s))² / (R (R - 1)))`` for ``R`` runs. Errors within the runs are part of that scatter, and
        are not added.

    Raises:
        ValueError: There are fewer than two runs, or they are of other numbers of queries.
    """
    if len(runs) < 2:
        raise ValueError(f"mean_over_runs: a standard error over seeds takes at least two runs, got {len(runs)}")
    shapes = {tuple(run.scores.shape[:-1]) for run in runs}
    if len(shapes) > 1:
        raise ValueError(
            f"mean_over_runs: scores must be of the same queries in every run, got {len(shapes)} different numbers of "
            "them; pass the same query, or list of queries, to every ledger"
        )
    ids = torch.unique(torch.cat([run.ids for run in runs]))
    each = torch.zeros(len(runs), *shapes.pop(), len(ids), dtype=torch.float64)
    for row, run in zip(each, runs, strict=True):
        row[..., torch.searchsorted(ids, run.ids)] = run.scores.double()
    return Scores(ids, each.mean(dim=0), each.std(dim=0) / math.sqrt(len(runs)))
