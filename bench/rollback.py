"""How well influence foretells retraining, how well samples are taken back, and what recording takes.

Each setting of ``bench.influence`` is recorded with three seeds. Other packages' estimators (``bench.attribution``)
score the same runs as ours and are judged by the same retrained losses. ``lds_drop1``, ``10`` and ``50`` are the
datamodeling scores for the recorded run itself with that share of its samples left out, ``trak50`` (of the MLPs) the
one for half of the samples and the mean loss over runs with other seeds. Of every score there is the mean over recorded
seeds and half the width of the 95 % interval of that mean (Student's t).

``undo_*``: of random sets of samples of a recorded run, ``KL(trained without || fast)`` over ``KL(trained without ||
untouched)`` on the test points, median over sets and seeds; and the share of sets for which it is below 1.

``finished_*``: of a finished ledger, its bytes by sample, how many times that the deltas take in fp32, and the mean
cosine of what it gives back with the deltas that the ledger has. What ``bench.alarm``, ``bench.budgets``,
``bench.kills``, ``bench.nations`` and ``bench.top_k`` add is explained there.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.rollback import finish, mean_over_runs

from . import attribution
from .alarm import PlainFisher, run_alarm, swept
from .budgets import run_budgets
from .harness import Report
from .influence import (
    SETTINGS,
    Setting,
    datamodeling_score,
    digits_mlp,
    kept_samples,
    record_run,
    retrained_losses,
)
from .kills import run_kills
from .nations import run_nations
from .recording import run_overhead
from .top_k import run_top_k

__all__ = ["run"]

SEEDS = (0, 1, 2)
SHARES = (0.01, 0.1, 0.5)
OTHER_SEEDS = 5

# By system: estimator and mode.
ESTIMATORS = {
    "gradkern ref": ("ref", "run"),
    "gradkern ref, expected": ("ref", "expected"),
    "gradkern direct": ("direct", "run"),
    "gradkern paper": ("paper", "run"),
    "gradkern gauss_newton": ("gauss_newton", "run"),
    "gradkern metagradient": ("metagradient", "run"),
}
BY_REPLAY = ("gauss_newton", "metagradient")

# What `ref` costs is compared with this.
_PLAIN = "plain empirical Fisher"

# Where it takes minutes, not hours, to retrain with other seeds as well.
MLPS = ("digits, MLP", "breast cancer, MLP")

# Samples to forget at once, of 1,000, and how many sets of them a seed.
FORGOTTEN = (1, 10, 50, 100)
SETS = 10

# Of finished ledgers.
RANKS = (1, 2, 4)

# Of Student's t with two degrees of freedom, 97.5 %.
_T = 4.303


# By name, in the order in which they run.
PARTS: dict[str, Callable[[Report, int], None]] = {
    "kills": lambda report, rounds: run_kills(report),
    "overhead": run_overhead,
    "budgets": lambda report, rounds: run_budgets(report),
    "top_k": run_top_k,
    "nations": lambda report, rounds: run_nations(report),
    "finished": lambda report, rounds: _finished(report, "digits, MLP", digits_mlp()),
    "self_test": lambda report, rounds: _self_test(report, "digits, MLP", digits_mlp()),
    "alarm": lambda report, rounds: run_alarm(report),
    "undo": lambda report, rounds: _undo(report, "digits, MLP", digits_mlp()),
    "estimators": lambda report, rounds: _estimators(report),
    "peers": lambda report, rounds: _peers(report),
}


def run(report: Report, rounds: int, part: str | None = None) -> None:
    """All parts, or one of them."""
    for name, run_part in PARTS.items():
        if part in (None, name):
            run_part(report, rounds)


def _settings(report: Report, scores_of: Callable[[str, Setting], Callable[[int], dict[str, Tensor]]]) -> None:
    """Judge scores by retraining: of a setting and then of a seed, by system."""
    for case, make in SETTINGS.items():
        setting = make()
        scores = scores_of(case, setting)
        found: dict[tuple[str, str], list[float]] = {}
        for seed in SEEDS:
            by_system = scores(seed)
            for metric, kept, losses in _judges(case, seed):
                for system, each in by_system.items():
                    found.setdefault((system, metric), []).append(datamodeling_score(each, kept, losses))
        for (system, metric), values in found.items():
            report.add(case, system, metric, statistics.fmean(values), "")
            if len(values) < len(SEEDS):  # a peer failed on some, which was said
                continue
            report.add(case, system, f"{metric}_interval", _T * statistics.stdev(values) / math.sqrt(len(values)), "")


@cache
def _judges(case: str, seed: int) -> list[tuple[str, Tensor, Tensor]]:
    """Metrics, each with the subsets and the losses that it is computed from."""
    setting = SETTINGS[case]()
    judges = []
    for share in SHARES:
        kept = kept_samples(len(setting.inputs), share, seed)
        judges.append((f"lds_drop{round(100 * share)}", kept, retrained_losses(setting, seed, kept)))
    if case in MLPS:
        kept = kept_samples(len(setting.inputs), 0.5, seed)
        others = [retrained_losses(setting, 100 * (seed + 1) + other, kept) for other in range(OTHER_SEEDS)]
        judges.append(("trak50", kept, torch.stack(others).mean(0)))
    return judges


def _estimators(report: Report) -> None:
    """Ours, and the least that each took of all seeds."""
    took: dict[tuple[str, str], list[float]] = {}

    def scores_of(case: str, setting: Setting) -> Callable[[int], dict[str, Tensor]]:
        def scores(seed: int) -> dict[str, Tensor]:
            several = {f"gradkern ref, expected, {attribution.ENSEMBLE} seeds": _expected_scores(setting, seed)}
            found, seconds = _scores(report, case, setting, seed)
            for system, each in seconds.items():
                took.setdefault((case, system), []).append(1e3 * each / len(setting.test_inputs))
            return found | several

        return scores

    _settings(report, scores_of)
    for (case, system), each in took.items():
        report.add(case, system, "query_ms", min(each), "ms")


def _peers(report: Report) -> None:
    """Those of other packages, tuned before."""

    def scores_of(case: str, setting: Setting) -> Callable[[int], dict[str, Tensor]]:
        tuned = attribution.tune(report, case, setting)
        return lambda seed: attribution.scores(setting, seed, tuned)

    _settings(report, scores_of)


def _scores(report: Report, case: str, setting: Setting, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of every estimator, from one recorded run, and what each took, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        model, ledger = record_run(setting, seed, Path(folder) / "ledger", replayable=True)
        queries = setting.queries()
        scores, took = {}, {}
        for system, (estimator, mode) in ESTIMATORS.items():
            asked: dict[str, Any] = {"loss_fn": nn.functional.cross_entropy, "estimator": estimator, "mode": mode}
            if estimator in BY_REPLAY:
                asked["replay"] = setting.replay()
            start = time.perf_counter()
            scores[system] = ledger.scores(model, queries, **asked).scores
            took[system] = time.perf_counter() - start
        start = time.perf_counter()
        scores[_PLAIN] = swept(ledger, model, setting, PlainFisher()).scores
        took[_PLAIN] = time.perf_counter() - start
        if seed == SEEDS[0]:
            right = (model(setting.test_inputs).argmax(1) == setting.test_labels).float().mean()
            report.add(case, "gradkern", "test_accuracy", 100 * float(right), "%")
            report.add(case, "gradkern", "bytes_per_sample_and_step", ledger.nbytes / ledger.visits, "B")
            cosine = statistics.fmean(each.cosine for each in ledger.verify(model).compression)
            report.add(case, "gradkern", "cosine", cosine, "")
    return scores, took


def _expected_scores(setting: Setting, seed: int) -> Tensor:
    """Mean over the runs that peers' ensembles are of."""
    found = []
    for other in attribution.ensemble_seeds(seed):
        with tempfile.TemporaryDirectory() as folder:
            model, ledger = record_run(setting, other, Path(folder) / "ledger")
            asked = ledger.scores(model, setting.queries(), loss_fn=nn.functional.cross_entropy, mode="expected")
            found.append(asked)
    return mean_over_runs(found).scores


def _undo(report: Report, case: str, setting: Setting) -> None:
    ratios: dict[int, list[float]] = {count: [] for count in FORGOTTEN}
    replay = setting.replay()
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


def _self_test(report: Report, case: str, setting: Setting) -> None:
    """What the library's own test of a ledger finds, and how long it takes."""
    with tempfile.TemporaryDirectory() as folder:
        model, ledger = record_run(setting, SEEDS[0], Path(folder) / "ledger", replayable=True)
        for estimator in ("ref", "direct"):
            start = time.perf_counter()
            found = ledger.self_test(model, setting.queries(), replay=setting.replay(), estimator=estimator)
            report.add(case, f"gradkern {estimator}", "self_test_seconds", time.perf_counter() - start, "s")
            report.add(case, f"gradkern {estimator}", "self_test_lds", found.lds, "")
            for end, value in zip(("low", "high"), found.interval, strict=True):
                report.add(case, f"gradkern {estimator}", f"self_test_lds_{end}", value, "")


def _finished(report: Report, case: str, setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, _ = record_run(setting, SEEDS[0], Path(folder) / "ledger")
        numel = sum(parameter.numel() for parameter in model.parameters())
        # As good as exact: a rank that no matrix here exceeds.
        whole = finish(Path(folder) / "ledger", Path(folder) / "whole.safetensors", rank=64)
        for rank in RANKS:
            finished = finish(Path(folder) / "ledger", Path(folder) / f"{rank}.safetensors", rank=rank)
            flat = [
                torch.cat([each.flatten(1) for each in file.deltas(file.ids).values()], dim=1)
                for file in (whole, finished)
            ]
            nbytes = finished.nbytes / len(finished.ids)
            report.add(case, f"gradkern, rank {rank}", "finished_bytes_per_sample", nbytes, "B")
            report.add(case, f"gradkern, rank {rank}", "finished_compression", 4 * numel / nbytes, "x")
            report.add(case, f"gradkern, rank {rank}", "finished_cosine", float(_cosine(*flat).mean()), "")


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """Of every row."""
    return nn.functional.cosine_similarity(left, right, dim=1)


def _divergence(setting: Setting, model: nn.Module, other: nn.Module) -> float:
    """``KL(model || other)``, mean over the test points."""
    with torch.no_grad():
        logs = [torch.log_softmax(each(setting.test_inputs).double(), dim=-1) for each in (other, model)]
    return float(nn.functional.kl_div(*logs, reduction="batchmean", log_target=True))
