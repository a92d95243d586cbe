"""Estimators of influence of other packages, to be judged beside ours; ``python -m bench.attribution`` says which run.

Every package has a virtual environment of its own, where a module of ``bench.attribution_peers`` scores a recorded run
from a job file. Each estimator is tried with six sets of hyper-parameters on a run whose seed is scored nowhere else,
and the one that foretells its retrained losses best (``lds_drop10``) is the one that is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attribution_peers.install import interpreter
from .attribution_peers.job import Job, Trial, reason_file, save, scores_file
from .harness import Report
from .influence import Setting, datamodeling_score, kept_samples, retrained_losses

__all__ = ["SYSTEMS", "System", "available", "ensemble_seeds", "make_job", "run_trials", "scores", "tune"]

TUNING_SEED = 9
TUNING_SHARE = 0.1

# Of the run that a peer is given, at equal distances; and how many runs from other seeds there are beside it.
CHECKPOINTS = 10
ENSEMBLE = 5

# Of a peer with all its trials; those of the slowest estimator come last. dattri's conjugate gradients on the CNN
# do not end in time.
TIMEOUT_S = 400

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class System:
    """An estimator: a module of ``bench.attribution_peers``, a method of it, and hyper-parameters to choose from."""

    peer: str
    method: str
    trials: tuple[Mapping[str, Any], ...]


_ALL = list(range(CHECKPOINTS))
_CHECKPOINTS = (_ALL, _ALL[-1:], _ALL[-3:], _ALL[-5:], _ALL[:5], _ALL[1::2])


def _trak(states: str, count: int, regularizations: Sequence[float]) -> tuple[dict[str, Any], ...]:
    return tuple({"states": states, "count": count, "regularization": each} for each in regularizations)


# Added to projected Gram matrices, which traker and dattri scale differently.
_TRAKER = (0.0, 1.0, 10.0, 100.0, 1e3, 1e4)
_DATTRI = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

SYSTEMS: dict[str, System] = {
    "captum TracInCP": System("captum", "TracInCP", tuple({"checkpoints": each} for each in _CHECKPOINTS)),
    "captum TracInCPFast": System("captum", "TracInCPFast", tuple({"checkpoints": each} for each in _CHECKPOINTS)),
    "kronfluence EKFAC": System(
        "kronfluence",
        "influence",
        tuple(
            {"strategy": "ekfac", "damping": each, "checkpoint": -1} for each in (None, 1e-8, 1e-5, 1e-4, 1e-3, 1e-2)
        ),
    ),
    "kronfluence identity": System(
        "kronfluence",
        "influence",
        tuple({"strategy": "identity", "damping": None, "checkpoint": each} for each in (9, 8, 7, 5, 3, 1)),
    ),
    "traker TRAK-1": System("traker", "TRAK", _trak("checkpoints", 1, _TRAKER)),
    "traker TRAK-5": System("traker", "TRAK", _trak("checkpoints", 5, _TRAKER)),
    "traker TRAK, 5 seeds": System("traker", "TRAK", _trak("ensemble", 5, _TRAKER)),
    "dattri TRAK-1": System("dattri", "TRAK", _trak("checkpoints", 1, _DATTRI)),
    "dattri TRAK-5": System("dattri", "TRAK", _trak("checkpoints", 5, _DATTRI)),
    "dattri TRAK, 5 seeds": System("dattri", "TRAK", _trak("ensemble", 5, _DATTRI)),
    "dattri TracIn": System(
        "dattri",
        "TracIn",
        tuple({"checkpoints": each, "normalized": cosine} for each in _CHECKPOINTS[:3] for cosine in (False, True)),
    ),
    "dattri IF-CG": System(
        "dattri",
        "IF-CG",
        tuple({"regularization": each, "iterations": count} for each in (1e-3, 1e-2, 1e-1) for count in (10, 20)),
    ),
    "dattri-llm TracIn": System(
        "dattri_llm",
        "TracIn",
        tuple({"steps": share, "normalized": cosine} for share in (1.0, 0.5, 0.1) for cosine in (False, True)),
    ),
    "dattri-llm DVEmb": System(
        "dattri_llm", "DVEmb", tuple({"lr_factor": each} for each in (1.0, 3.0, 10.0, 30.0, 100.0, 300.0))
    ),
    "dattri-llm AdamW-influence": System(
        "dattri_llm",
        "AdamW-influence",
        tuple(
            {"steps": share, "loss_reduction": reduction} for share in (1.0, 0.5, 0.1) for reduction in ("mean", "sum")
        ),
    ),
}


def _absent(peer: str) -> str | None:
    return None if interpreter(peer).exists() else "not installed; try `make bench-attribution`"


def available() -> dict[str, str | None]:
    """Why each peer cannot run; None where it can be imported."""
    reasons: dict[str, str | None] = {}
    for peer in dict.fromkeys(system.peer for system in SYSTEMS.values()):
        reasons[peer] = _absent(peer)
        if reasons[peer] is None:
            command = [interpreter(peer), "-c", f"import bench.attribution_peers.{peer}"]
            found = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
            reasons[peer] = None if found.returncode == 0 else _last_line(found.stderr)
    return reasons


def _command(peer: str) -> list[str | Path]:
    return [interpreter(peer), "-m", f"bench.attribution_peers.{peer}"]


def make_job(setting: Setting, seed: int, trials: Sequence[Trial]) -> Job:
    """The setting's run, trained with checkpoints, and runs from other seeds."""
    states = _checkpoints(setting, seed)
    ensemble = [_checkpoints(setting, other)[-1] for other in ensemble_seeds(seed)]
    return Job(
        setting.model(seed),
        states,
        ensemble,
        setting.inputs,
        setting.labels,
        setting.test_inputs,
        setting.test_labels,
        setting.batches(seed),
        setting.lr,
        setting.weight_decay,
        setting.max_norm,
        trials,
    )


def ensemble_seeds(seed: int) -> list[int]:
    """Of further runs, none of them one of ``trak50``: an estimator must not see the models that judge it."""
    return [7000 + 10 * seed + other for other in range(ENSEMBLE)]


def _checkpoints(setting: Setting, seed: int) -> list[dict[str, Tensor]]:
    model = setting.model(seed)
    optimizer = setting.make_optimizer(model)
    batches = setting.batches(seed)
    ends = {round((i + 1) * len(batches) / CHECKPOINTS) - 1 for i in range(CHECKPOINTS)}
    states = []
    for step, rows in enumerate(batches):
        inputs, labels = setting.fetch(rows)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in ends:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def run_trials(command: Sequence[str | Path], job: Job, timeout_s: float = TIMEOUT_S) -> list[Tensor | str]:
    """Run a peer on a job.

    Args:
        command: Takes the job's file and a folder for what it writes as two more arguments.
        job: What to score.
        timeout_s: The process is ended after that; what it had scored by then counts.

    Returns:
        For every trial its scores, shape ``(queries, samples)``, or why there are none.
    """
    shape = (len(job.test_inputs), len(job.inputs))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(job, folder / "job.pt")
        # Peers leave temporary files behind: here they go with the folder.
        environment = {**os.environ, "TMPDIR": name, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        try:
            done = subprocess.run(
                [*command, folder / "job.pt", folder],
                cwd=_ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
            ended = f"exit status {done.returncode}: {_last_line(done.stderr)}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {timeout_s:g} s"
        return [_outcome(folder, i, shape, ended) for i in range(len(job.trials))]


def _outcome(folder: Path, trial: int, shape: tuple[int, int], ended: str) -> Tensor | str:
    if reason_file(folder, trial).exists():
        return reason_file(folder, trial).read_text()
    if not scores_file(folder, trial).exists():
        return ended
    try:
        found = torch.from_numpy(np.load(scores_file(folder, trial))).double()
    except (ValueError, EOFError):  # the process was ended while it wrote
        return ended
    if tuple(found.shape) != shape:
        return f"scores have shape {tuple(found.shape)}, expected {shape}"
    if not found.isfinite().all():
        return f"{int((~found.isfinite()).sum())} of {found.numel()} scores are not finite"
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def scores(setting: Setting, seed: int, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Of every system on a setting's run, by one process a peer; why one has none goes to stderr.

    Args:
        setting: The run.
        seed: Of its start and its order.
        chosen: Hyper-parameters by system, as :func:`tune` returns them.
    """
    found = _run_all(setting, seed, [(system, options) for system, options in chosen.items()])
    kept = {}
    for (system, _), outcome in zip(chosen.items(), found, strict=True):
        if isinstance(outcome, str):
            _say(system, outcome)
        else:
            kept[system] = outcome
    return kept


def tune(report: Report, case: str, setting: Setting) -> dict[str, Mapping[str, Any]]:
    """The best hyper-parameters of every system that runs here, on a run of its own.

    Records ``tuned_trial``, which of a system's trials that is, ``tuned_lds_drop10``, what it scored there, and
    ``trials_failed``, how many of them had no scores; why goes to stderr.
    """
    tried = [(system, options) for system, each in SYSTEMS.items() for options in each.trials]
    outcomes: dict[str, list[Tensor | str]] = defaultdict(list)
    for (system, _), outcome in zip(tried, _run_all(setting, TUNING_SEED, tried), strict=True):
        outcomes[system].append(outcome)
    kept = kept_samples(len(setting.inputs), TUNING_SHARE, TUNING_SEED)
    losses = retrained_losses(setting, TUNING_SEED, kept)
    chosen = {}
    for system, found in outcomes.items():
        reasons = [outcome for outcome in found if isinstance(outcome, str)]
        for reason in dict.fromkeys(reasons):
            _say(system, f"{reason} ({reasons.count(reason)} of {len(found)} trials)")
        report.add(case, system, "trials_failed", len(reasons), "")
        values = {
            i: datamodeling_score(outcome, kept, losses)
            for i, outcome in enumerate(found)
            if not isinstance(outcome, str)
        }
        if not values:
            continue
        best = max(values, key=values.__getitem__)
        report.add(case, system, "tuned_trial", best, "")
        report.add(case, system, "tuned_lds_drop10", values[best], "")
        chosen[system] = SYSTEMS[system].trials[best]
    return chosen


def _run_all(setting: Setting, seed: int, tried: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Tensor | str]:
    """One process for every peer, whatever the number of its trials; in the order of what is tried."""
    tried = list(tried)
    job = make_job(setting, seed, ())
    places: dict[str, list[int]] = defaultdict(list)
    for i, (system, _) in enumerate(tried):
        places[SYSTEMS[system].peer].append(i)

    def score(peer: str) -> list[Tensor | str]:
        trials = [Trial(SYSTEMS[tried[i][0]].method, tried[i][1]) for i in places[peer]]
        reason = _absent(peer)
        return run_trials(_command(peer), replace(job, trials=trials)) if reason is None else [reason] * len(trials)

    outcomes: list[Tensor | str] = [""] * len(tried)
    # As many at a time as there are cores: what they take is not measured.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for peer, found in zip(places, pool.map(score, places), strict=True):
            for i, outcome in zip(places[peer], found, strict=True):
                outcomes[i] = outcome
    return outcomes


def _say(system: str, reason: str) -> None:
    print(f"without {system}: {reason}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for peer_name, why_not in available().items():
        print(f"{peer_name:24} {why_not or 'ok'}")
