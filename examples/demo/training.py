"""The training loop, and the two steps of it whose memory is measured."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GPT2LMHeadModel

import gradkern as gk

from .corpus import Corpus
from .figures import Training
from .model import mean_loss

__all__ = [
    "ACCUMULATE",
    "MAX_NORM",
    "MEASURED_STEP",
    "ROWS_PER_MICRO_BATCH",
    "Loop",
    "RecordingCost",
    "rehearse",
    "rehearse_plan",
    "start_recording",
    "train",
]

ACCUMULATE = 4
ROWS_PER_MICRO_BATCH = 4
MAX_NORM = 1.0
STEPS_PER_SEGMENT = 4
# The last step of the second segment: optimizer state and records are all there, and a file is written.
MEASURED_STEP = 2 * STEPS_PER_SEGMENT - 1
_LEARNING_RATE = 1.5e-3
_WARM_UP_STEPS = 10
_HELD_OUT_ROWS = 32


@dataclass(frozen=True)
class Loop:
    """A model, its optimizer and the order in which it meets the training rows.

    Attributes:
        model: Trained in place.
        optimizer: Clips and steps.
        corpus: Where the rows come from.
        order: Sample ids, each once; int64, shape ``(len(corpus),)``.
    """

    model: GPT2LMHeadModel
    optimizer: gk.AdamW
    corpus: Corpus
    order: torch.Tensor

    @classmethod
    def start(cls, model: GPT2LMHeadModel, corpus: Corpus, order: torch.Tensor, *, state: str | None = None) -> Loop:
        """Begin training ``model``; ``state`` is the precision of the optimizer's moments, by default fp32."""
        optimizer = gk.AdamW(
            model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, max_norm=MAX_NORM, state=state
        )
        return cls(model, optimizer, corpus, order)

    @property
    def tokens_per_step(self) -> int:
        """Bytes of text in one optimizer step."""
        return ACCUMULATE * ROWS_PER_MICRO_BATCH * self.corpus.length

    def batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the sample ids and the rows of each micro-batch of a step."""
        rows_per_step = ACCUMULATE * ROWS_PER_MICRO_BATCH
        ids = self.order[step * rows_per_step : (step + 1) * rows_per_step]
        return [(part, self.corpus.rows(part)) for part in ids.split(ROWS_PER_MICRO_BATCH)]

    def step(self, step: int, recorder: gk.rollback.Recorder | None) -> float:
        """Accumulate, clip and step once; return the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / _WARM_UP_STEPS)
        losses = []
        for ids, rows in self.batches(step):
            if recorder is None:
                losses.append(self._backward(rows))
            else:
                with recorder.batch(ids):
                    losses.append(self._backward(rows))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(losses) / ACCUMULATE

    def _backward(self, rows: torch.Tensor) -> float:
        rows = rows.to(self.model.device)
        loss = self.model(input_ids=rows, labels=rows).loss
        (loss / ACCUMULATE).backward()
        return float(loss.detach())


@dataclass(frozen=True)
class RecordingCost:
    """What recording adds to a step's peak, for ``gradkern.checkpoint.plan`` to count."""

    peak_bytes: int

    def held_bytes(self) -> int:
        """Bytes to add."""
        return self.peak_bytes


def rehearse(loop: Loop) -> tuple[gk.checkpoint.Peak[float], RecordingCost]:
    """Measure a step without a plan, natural and then recorded, on copies: the run itself starts untouched.

    Returns:
        The natural peak, and what recording adds to it when a whole segment of records is held.
    """
    twin = _twin(loop)
    for step in range(STEPS_PER_SEGMENT - 1):
        twin.step(step, None)
    natural = _measure(twin, STEPS_PER_SEGMENT - 1, None)

    del twin
    return natural, RecordingCost(_recorded_peak(loop, None) - natural.peak_bytes)


def rehearse_plan(loop: Loop, plan: gk.checkpoint.Plan, cost: RecordingCost) -> RecordingCost:
    """Measure a recorded step under a plan, on a copy.

    What recording needs for a moment adds to the peak only where that peak is, and a plan moves it.

    Returns:
        What recording adds under this plan, at least ``cost``, which the plan was made with.
    """
    more = _recorded_peak(loop, plan) - plan.predicted_peak_bytes
    return RecordingCost(cost.peak_bytes + max(0, more))


def _recorded_peak(loop: Loop, plan: gk.checkpoint.Plan | None) -> int:
    """Peak of the step of a copy that fills a second segment of records, the first of which has been written."""
    twin = _twin(loop)
    if plan is not None:
        plan.apply(twin.model)
    with TemporaryDirectory() as folder, start_recording(twin, Path(folder) / "ledger") as recorder:
        for step in range(MEASURED_STEP):
            twin.step(step, recorder)
        return _measure(twin, MEASURED_STEP, recorder).peak_bytes


def start_recording(loop: Loop, path: Path) -> gk.rollback.Recorder:
    """Record a loop into a new ledger at ``path``."""
    return gk.rollback.record(loop.model, loop.optimizer, path, steps_per_segment=STEPS_PER_SEGMENT)


def train(
    loop: Loop, recorder: gk.rollback.Recorder, steps: int, console: Console
) -> tuple[Training, gk.checkpoint.Peak[float]]:
    """Train with recording on.

    Args:
        loop: What to train.
        recorder: Records every sample's effect.
        steps: Optimizer steps, more than ``MEASURED_STEP``.
        console: Where the progress bar goes.

    Returns:
        The course of the training, and the measured peak of one of its own steps.
    """
    # Not kept meanwhile: it would be memory that the plan does not know of.
    held_out_first = mean_loss(loop.model, loop.corpus.held_out_rows(_HELD_OUT_ROWS))
    losses: list[float] = []
    grad_norms: list[float] = []
    measured: list[gk.checkpoint.Peak[float]] = []
    started = time.perf_counter()
    with _progress(console) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"), norm=float("nan"), speed=0.0)
        for step in range(steps):
            if step == MEASURED_STEP:
                measured.append(_measure(loop, step, recorder))
                losses.append(measured[-1].result)
            else:
                losses.append(loop.step(step, recorder))
            grad_norms.append(float(loop.optimizer.grad_norm))
            speed = loop.tokens_per_step * (step + 1) / (time.perf_counter() - started)
            progress.update(task, advance=1, loss=losses[-1], norm=grad_norms[-1], speed=speed)
    training = Training(
        losses=tuple(losses),
        grad_norms=tuple(grad_norms),
        seconds=time.perf_counter() - started,
        tokens=loop.tokens_per_step * steps,
        held_out_first=held_out_first,
        held_out_last=mean_loss(loop.model, loop.corpus.held_out_rows(_HELD_OUT_ROWS)),
    )
    return training, measured[0]


def _twin(loop: Loop) -> Loop:
    return Loop.start(copy.deepcopy(loop.model), loop.corpus, loop.order)


def _measure(loop: Loop, step: int, recorder: gk.rollback.Recorder | None) -> gk.checkpoint.Peak[float]:
    return gk.checkpoint.measure_peak(lambda: loop.step(step, recorder), model=loop.model, optimizer=loop.optimizer)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("norm {task.fields[norm]:.2f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
