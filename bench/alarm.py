"""Whether the alarm of a sweep that has gone wild rings where scores are noise.

A sweep carries influence back through the curvature of every step. With another curvature than the loss has, or where
steps are too large for it, influence grows on its way and the scores are worse than none; ``UnstableInfluenceError``
says so. Here sweeps are driven to it: on networks and learning rates like those where the plain empirical Fisher matrix
was seen to explode (a smooth network, four hundred steps of a ReLU network, steps too large), and with curvatures that
do: that matrix and three times the reweighted one, neither of which the library offers. Of each ``lds_drop10``,
``growth``, the most of any query, and ``alarm``, 1 where that is an error. ``is_told`` is 1 where the alarm rings or
the score is no worse than that of ``direct`` by more than 0.02.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gradkern.rollback import Ledger
from gradkern.rollback._estimators import _MOST_GROWTH, _stacked_gradients
from gradkern.rollback._gauss_newton import GaussNewton
from gradkern.rollback._reading import read_segments
from gradkern.rollback._replay import Replayer
from gradkern.rollback._sweep import Curvature, EmpiricalFisher, StepBack, Swept, sweep
from gradkern.rollback._trajectory import Trajectory

from .harness import Report
from .influence import Setting, datamodeling_score, digits_mlp, kept_samples, record_run, retrained_losses

__all__ = ["PlainFisher", "run_alarm", "swept"]

_SHARE, _WORSE = 0.1, 0.02


class PlainFisher:
    """The empirical Fisher matrix of a mean over the batch: ``Σ_i g_i g_iᵀ / B`` of each sample's own gradient.

    Recorded gradients are those of the mean, of which ``B`` times the squares are that.
    """

    def add_product(self, step: StepBack, sums: Mapping[int, Tensor]) -> None:
        """See :class:`gradkern.rollback._sweep.Curvature`."""
        coefficients = step.inner * step.inner.shape[1]
        for index, record in step.records:
            record.add_to(sums[index], coefficients[:, record.visit.long()])


def swept(ledger: Ledger, model: nn.Module, setting: Setting, curvature: Curvature | None) -> Swept:
    """Scores of a setting's queries with any curvature, and no alarm."""
    layout = ledger._layout
    owned = layout.owned(layout.trained_parameters(model))
    gradients = _stacked_gradients(model, owned, setting.queries(), nn.functional.cross_entropy)
    return sweep(layout, gradients, read_segments(ledger._store, backwards=True), curvature)


def run_alarm(report: Report) -> None:
    """Every setting with every curvature, of one recorded run."""
    for case, setting in _settings().items():
        kept = kept_samples(len(setting.inputs), _SHARE, 0)
        losses = retrained_losses(setting, 0, kept)
        with tempfile.TemporaryDirectory() as folder:
            model, ledger = record_run(setting, 0, Path(folder) / "ledger", replayable=True)
            found = {
                name: swept(ledger, model, setting, make(ledger, model, setting)) for name, make in _CURVATURES.items()
            }
        scores = {name: datamodeling_score(each.scores, kept, losses) for name, each in found.items()}
        for name, each in found.items():
            growth = float(each.growth.nan_to_num(torch.inf).max())
            rings = not growth <= _MOST_GROWTH
            report.add(case, name, "lds_drop10", scores[name], "")
            report.add(case, name, "growth", min(growth, 1e30), "x")
            report.add(case, name, "alarm", int(rings), "")
            report.add(case, name, "is_told", int(rings or scores[name] >= scores["direct"] - _WORSE), "")


def _gauss_newton(ledger: Ledger, model: nn.Module, setting: Setting) -> Curvature:
    return GaussNewton(ledger._layout, Trajectory(Replayer(ledger._store, model, setting.replay(), otherwise="direct")))


_CURVATURES: Mapping[str, Callable[[Ledger, nn.Module, Setting], Curvature | None]] = {
    "direct": lambda *_: None,
    "ref": lambda *_: EmpiricalFisher(1.0),
    "gauss_newton": _gauss_newton,
    "plain Fisher": lambda *_: PlainFisher(),
    "ref, three times": lambda *_: EmpiricalFisher(3.0),
}


def _settings() -> dict[str, Setting]:
    relu = digits_mlp()
    gelu = replace(relu, make_model=_gelu)
    return {
        "alarm: GELU": gelu,
        "alarm: GELU, lr 0.01": replace(gelu, lr=1e-2),
        "alarm: GELU, small lr, unclipped": replace(gelu, lr=1e-3, max_norm=1e9),
        "alarm: ReLU, 400 steps": replace(relu, epochs=20),
        "alarm: ReLU, lr 0.01": replace(relu, lr=1e-2),
        "alarm: ReLU, lr 0.03": replace(relu, lr=3e-2),
    }


def _gelu() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
