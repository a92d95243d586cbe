"""Suite ``state8_loss``: the loss that the demo's model reaches with 8-bit moments, beside that with fp32 ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .harness import Report
from .systems import demo_module

__all__ = ["CASES", "Size", "paired_difference", "run"]

SEEDS = 5
# Quantile 0.975 of Student's t with SEEDS - 1 degrees of freedom.
T_975 = 2.7764451

SYSTEMS = {"gradkern fp32": "fp32", "gradkern int8": "int8"}


@dataclass(frozen=True)
class Size:
    """What is trained, and for how long.

    Attributes:
        layers: Blocks of the model.
        width: Of its embedding.
        length: Bytes in a row.
        steps: Updates, of as many rows each as the demo's.
        held_out_rows: Rows that the loss is taken on in the end.
    """

    layers: int
    width: int
    length: int
    steps: int
    held_out_rows: int


# The demo has 8 blocks of width 192 on rows of 256 bytes: 5 times the parameters.
CASES = {"byte_gpt_4x128": Size(layers=4, width=128, length=128, steps=200, held_out_rows=256)}


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """How much larger values are than those of the same seeds, in %: the mean, and half its 95 % interval."""
    differences = [100 * (value / base - 1) for value, base in zip(values, baseline, strict=True)]
    return statistics.mean(differences), T_975 * statistics.stdev(differences) / math.sqrt(len(differences))


def run(report: Report, rounds: int) -> None:
    """Train every case from ``SEEDS`` seeds, which fix weights and order of rows; ``rounds`` are for suites of time."""
    del rounds
    for case, size in CASES.items():
        losses: dict[str, list[float]] = {name: [] for name in SYSTEMS}
        for seed in range(SEEDS):
            for name, state in SYSTEMS.items():
                losses[name].append(_final_loss(size, seed, state, report.device))
                report.add(case, name, f"held_out_loss_seed_{seed}", losses[name][-1], "nats/byte")
        baseline, *others = SYSTEMS
        for name in SYSTEMS:
            report.add(case, name, "held_out_loss", statistics.mean(losses[name]), "nats/byte")
        for name in others:
            mean, half = paired_difference(losses[name], losses[baseline])
            pair = f"{name} / {baseline}"
            report.add(case, pair, "loss_difference", mean, "%")
            report.add(case, pair, "loss_difference_low", mean - half, "%")
            report.add(case, pair, "loss_difference_high", mean + half, "%")


def _final_loss(size: Size, seed: int, state: str, device: torch.device) -> float:
    """Mean held-out loss after training from a seed, in nats per byte."""
    models = demo_module("model")
    corpus = demo_module("corpus").Corpus(size.length)
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed))
    model = models.build_model(layers=size.layers, width=size.width, length=size.length, seed=seed).to(device)
    loop = demo_module("training").Loop.start(model, corpus, order, state=state)
    for step in range(size.steps):
        loop.step(step, None)
    return float(models.mean_loss(model, corpus.held_out_rows(size.held_out_rows).to(device)))
