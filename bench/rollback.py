"""How well influence foretells retraining, how well samples are taken back, and what recording takes.

Each setting of ``bench.influence`` is recorded with three seeds. ``lds_drop1``, ``10`` and ``50`` are the datamodeling
scores for the recorded run itself with that share of its samples left out, ``trak50`` (of the MLPs) the one for half of
the samples and the mean loss over runs with other seeds. Of every score there is the mean over recorded seeds and half
the width of the 95 % interval of that mean (Student's t).

``undo_*``: of random sets of samples of a recorded run, ``KL(trained without || fast)`` over ``KL(trained without ||
untouched)`` on the test points, median over sets and seeds; and the share of sets for which it is below 1.

``kills*``: see ``bench.kills``.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from gradkern.rollback import Replay

from .harness import Report
from .influence import SETTINGS, Setting, datamodeling_score, digits_mlp, record_run, retrained_losses
from .kills import run_kills
from .recording import run_overhead

__all__ = ["run"]

SEEDS = (0, 1, 2)
SHARES = (0.01, 0.1, 0.5)
SUBSETS = 200
OTHER_SEEDS = 5

# By system: estimator and mode.
ESTIMATORS = {
    "gradkern ref": ("ref", "run"),
    "gradkern ref, expected": ("ref", "expected"),
    "gradkern direct": ("direct", "run"),
}

# Where retraining with other seeds as well takes minutes, not hours.
TRAK = ("digits, MLP", "breast cancer, MLP")

# Samples to forget at once, of 1,000, and how many sets of them a seed.
FORGOTTEN = (1, 10, 50, 100)
SETS = 10

# Of Student's t with two degrees of freedom, 97.5 %.
_T = 4.303


def run(report: Report, rounds: int) -> None:
    """Every setting, undoing, the overhead, and kills."""
    run_kills(report)
    run_overhead(report, rounds)
    _undo(report, "digits, MLP", digits_mlp())
    for case, make in SETTINGS.items():
        _setting(report, case, make())


def _setting(report: Report, case: str, setting: Setting) -> None:
    found: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        scores = _scores(report, case, setting, seed)
        for share in SHARES:
            kept = _kept(len(setting.inputs), share, seed)
            losses = retrained_losses(setting, seed, kept)
            for system, each in scores.items():
                value = datamodeling_score(each, kept, losses)
                found.setdefault((system, f"lds_drop{round(100 * share)}"), []).append(value)
        if case not in TRAK:
            continue
        kept = _kept(len(setting.inputs), 0.5, seed)
        others = [retrained_losses(setting, 100 * (seed + 1) + other, kept) for other in range(OTHER_SEEDS)]
        mean_loss = torch.stack(others).mean(0)
        for system, each in scores.items():
            found.setdefault((system, "trak50"), []).append(datamodeling_score(each, kept, mean_loss))
    for (system, metric), values in found.items():
        report.add(case, system, metric, statistics.fmean(values), "")
        report.add(case, system, f"{metric}_interval", _T * statistics.stdev(values) / math.sqrt(len(values)), "")


def _scores(report: Report, case: str, setting: Setting, seed: int) -> dict[str, Tensor]:
    """Of every estimator, from one recorded run; of the first, what it took."""
    with tempfile.TemporaryDirectory() as folder:
        model, ledger = record_run(setting, seed, Path(folder) / "ledger")
        queries = setting.queries()
        scores = {}
        for system, (estimator, mode) in ESTIMATORS.items():
            start = time.perf_counter()
            found = ledger.scores(model, queries, loss_fn=nn.functional.cross_entropy, estimator=estimator, mode=mode)
            seconds = time.perf_counter() - start
            scores[system] = found.scores
            if seed == SEEDS[0]:
                report.add(case, system, "query_ms", 1e3 * seconds / len(queries), "ms")
        if seed == SEEDS[0]:
            right = (model(setting.test_inputs).argmax(1) == setting.test_labels).float().mean()
            report.add(case, "gradkern", "test_accuracy", 100 * float(right), "%")
            report.add(case, "gradkern", "bytes_per_sample_and_step", ledger.nbytes / ledger.visits, "B")
            cosine = statistics.fmean(each.cosine for each in ledger.verify(model).compression)
            report.add(case, "gradkern", "cosine", cosine, "")
    return scores


def _undo(report: Report, case: str, setting: Setting) -> None:
    ratios: dict[int, list[float]] = {count: [] for count in FORGOTTEN}
    replay = Replay(setting.fetch, setting.make_optimizer, nn.functional.cross_entropy)
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            model, ledger = record_run(setting, seed, Path(folder) / "ledger", replayable=True)
            generator = torch.Generator().manual_seed(seed)
            for count in FORGOTTEN:
                for _ in range(SETS):
                    ids = torch.randperm(len(setting.inputs), generator=generator)[:count]
                    exact = ledger.undo(model, ids, replay=replay).model
                    fast = ledger.undo(model, ids, method="fast", probe=setting.test_inputs).model
                    untouched = _divergence(setting, exact, model)
                    ratios[count].append(_divergence(setting, exact, fast) / untouched)
    for count, found in ratios.items():
        report.add(case, "gradkern fast", f"undo_{count}_median", statistics.median(found), "")
        report.add(case, "gradkern fast", f"undo_{count}_worst", max(found), "")
        report.add(
            case, "gradkern fast", f"undo_{count}_helped", 100 * sum(each < 1 for each in found) / len(found), "%"
        )


def _divergence(setting: Setting, model: nn.Module, other: nn.Module) -> float:
    """``KL(model || other)``, mean over the test points."""
    with torch.no_grad():
        logs = [torch.log_softmax(each(setting.test_inputs).double(), dim=-1) for each in (other, model)]
    return float(nn.functional.kl_div(*logs, reduction="batchmean", log_target=True))


def _kept(samples: int, share: float, seed: int) -> Tensor:
    """Random subsets: all samples but a share."""
    generator = torch.Generator().manual_seed(1000 * seed + round(1000 * share))
    order = torch.rand(SUBSETS, samples, generator=generator).argsort(dim=1)
    return order >= round(share * samples)
