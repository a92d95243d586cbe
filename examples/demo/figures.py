"""The figures that a run of the demo collects: what the report shows and what ``quickstart.json`` holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .corpus import Snippet

__all__ = ["Figures", "Influential", "LedgerSummary", "Memory", "Prediction", "Setup", "Timing", "Training"]


@dataclass(frozen=True)
class Setup:
    """What was run, and on what."""

    model: str
    parameter_count: int
    data: str
    batch: str
    software: str


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes, each of one whole accumulation cycle, and how memory went over time.

    Attributes:
        natural_peak_bytes: Without a plan and without recording.
        budget_bytes: What the plan was made for.
        predicted_peak_bytes: What the plan said.
        measured_peak_bytes: Of a training step under the plan, with recording on.
        natural_timeline: ``(seconds, live bytes)`` of the natural cycle.
        planned_timeline: The same under the plan.
        units: ``(name, option, bytes saved for backward when kept)`` for every unit of the plan.
    """

    natural_peak_bytes: int
    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    natural_timeline: tuple[tuple[float, int], ...]
    planned_timeline: tuple[tuple[float, int], ...]
    units: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Training:
    """One value per optimizer step, and the held-out loss before and after."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    seconds: float
    tokens: int
    held_out_first: float
    held_out_last: float

    @property
    def loss_last(self) -> float:
        """Mean loss of the last five steps: one step's sixteen rows are a noisy sample."""
        tail = self.losses[-5:]
        return sum(tail) / len(tail)


@dataclass(frozen=True)
class Timing:
    """One thing timed side by side.

    Attributes:
        name: What was timed.
        ours_s: Seconds with gradkern, the best round.
        torch_s: Seconds with torch's own best way, the best round.
        ours_bytes: Bytes moved with gradkern by the model of passes over memory; None where it says little.
        torch_bytes: The same for torch.
        rounds: Interleaved rounds.
    """

    name: str
    ours_s: float
    torch_s: float
    ours_bytes: int | None
    torch_bytes: int | None
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times faster than torch."""
        return self.torch_s / self.ours_s


@dataclass(frozen=True)
class LedgerSummary:
    """What the ledger holds and whether it can be trusted.

    Attributes:
        conservation_error: Relative error of the conservation law on the exact factors.
        conservation_bound: What the error must not pass.
        size_bytes: Size of the ledger's folder.
        sample_count: Training rows recorded, one per visit.
        checks: ``(name, passed, detail)`` from ``ledger.verify``.
        compression_cosine: Mean cosine between a compressed record and the exact gradient it stands for.
    """

    conservation_error: float
    conservation_bound: float
    size_bytes: int
    sample_count: int
    checks: tuple[tuple[str, bool, str], ...]
    compression_cosine: float


@dataclass(frozen=True)
class Influential:
    """A training sample and how much the prediction owes to it."""

    sample_id: int
    score: float
    snippet: Snippet


@dataclass(frozen=True)
class Prediction:
    """A held-out prompt, what the model made of it, and the samples behind that."""

    prompt: Snippet
    continuation: str
    influences: tuple[Influential, ...]


@dataclass(frozen=True)
class Figures:
    """Everything a run found out."""

    setup: Setup
    memory: Memory
    training: Training
    update_cycle: Timing
    whole_step: Timing
    ledger: LedgerSummary
    prediction: Prediction

    def write_json(self, path: Path) -> None:
        """Write the headline figures: sizes in bytes, losses in nats per byte, ratios torch over gradkern."""
        headline = {
            "natural_peak_bytes": self.memory.natural_peak_bytes,
            "budget_bytes": self.memory.budget_bytes,
            "predicted_peak_bytes": self.memory.predicted_peak_bytes,
            "measured_peak_bytes": self.memory.measured_peak_bytes,
            "conservation_error": self.ledger.conservation_error,
            "cycle_ratio": self.update_cycle.ratio,
            "step_ratio": self.whole_step.ratio,
            "steps": len(self.training.losses),
            "loss_first": self.training.losses[0],
            "loss_last": self.training.loss_last,
        }
        path.write_text(json.dumps(headline, indent=2) + "\n", encoding="utf-8")
