"""Train a byte-level GPT on Python's standard library, in less memory, and ask it who taught it what.

One training loop with all parts of gradkern in it: a checkpoint plan for 0.6 times the natural peak,
accumulation and clipping inside the optimizer, every sample's effect recorded, and the ledger asked for the
training snippets behind a continuation. Writes ``OUT/report.html`` and ``OUT/quickstart.json``.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from demo import console as terminal
from demo.corpus import Corpus
from demo.figures import Figures, LedgerSummary, Memory, Setup, Timing
from demo.influence import explain_continuation
from demo.model import build_model
from demo.report import render_report
from demo.timing import time_update_cycle, time_whole_step
from demo.training import (
    ACCUMULATE,
    MAX_NORM,
    MEASURED_STEP,
    ROWS_PER_MICRO_BATCH,
    Loop,
    RecordingCost,
    rehearse,
    rehearse_plan,
    start_recording,
    train,
)

import gradkern as gk

BUDGET_SHARE = 0.6
CYCLE_ROUNDS = 30
STEP_ROUNDS = 9


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the defaults are what ``make demo`` runs."""
    args = parse_arguments(argv)
    console = terminal.open_console()
    ledger_path = args.out / "ledger"
    args.out.mkdir(parents=True, exist_ok=True)
    if ledger_path.exists():
        shutil.rmtree(ledger_path)

    corpus = Corpus(args.length)
    model = build_model(layers=args.layers, width=args.width, length=args.length, seed=args.seed)
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(args.seed))
    loop = Loop.start(model, corpus, order)
    setup = describe(args, loop)
    terminal.print_setup(console, setup)

    natural, recording_cost = rehearse(loop)
    plan = make_plan(loop, natural, recording_cost)
    planned_cost = rehearse_plan(loop, plan, recording_cost)
    if planned_cost != recording_cost:
        plan = make_plan(loop, natural, planned_cost)
    plan.apply(model)
    terminal.print_plan(console, plan)
    with start_recording(loop, ledger_path) as recorder:
        training, planned = train(loop, recorder, args.steps, console)
    plan.remove(model)
    terminal.print_training(console, training)
    memory = compare_peaks(natural, plan, planned)
    terminal.print_peaks(console, memory)

    update_cycle, whole_step = time_beside_torch(loop, args.steps)
    terminal.print_timings(console, update_cycle, whole_step)

    ledger = gk.rollback.open(ledger_path)
    trust = check_ledger(ledger, loop, ledger_path)
    terminal.print_ledger(console, trust)
    prediction = explain_continuation(ledger, model, corpus, seed=args.seed)
    terminal.print_prediction(console, prediction)

    figures = Figures(setup, memory, training, update_cycle, whole_step, trust, prediction)
    figures.write_json(args.out / "quickstart.json")
    report = args.out / "report.html"
    report.write_text(render_report(figures, max_norm=MAX_NORM), encoding="utf-8")
    console.print(f"\nThe report: [bold]{report}[/]")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; the sizes exist so that a test can run the demo small."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        help="for report, figures and ledger; replaces an earlier ledger there (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, sampling (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="embedding width (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="bytes in a row (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps <= MEASURED_STEP:
        parser.error(f"--steps must be at least {MEASURED_STEP + 1}, got {args.steps}")
    return args


def describe(args: argparse.Namespace, loop: Loop) -> Setup:
    """Say in words what is run, and on what."""
    corpus = loop.corpus
    return Setup(
        model=f"GPT-2 architecture over bytes, {args.layers} blocks of width {args.width}",
        parameter_count=sum(param.numel() for param in loop.model.parameters()),
        data=(
            f"Text: the standard library of Python {platform.python_version()}, {len(corpus):,} rows of "
            f"{corpus.length} bytes from {corpus.file_count} files"
        ),
        batch=(
            f"Micro-batches of {ROWS_PER_MICRO_BATCH} rows, {ACCUMULATE} accumulated per step, "
            f"clipped to norm {MAX_NORM:g}"
        ),
        software=(
            f"gradkern {gk.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads on "
            f"{platform.machine()}"
        ),
    )


def make_plan(loop: Loop, natural: gk.checkpoint.Peak[float], cost: RecordingCost) -> gk.checkpoint.Plan:
    """Plan for a share of the natural peak."""
    return gk.checkpoint.plan(
        loop.model,
        first_batch(loop),
        budget=int(BUDGET_SHARE * natural.peak_bytes),
        optimizer=loop.optimizer,
        accumulate=ACCUMULATE,
        recorder=cost,
    )


def first_batch(loop: Loop) -> dict[str, torch.Tensor]:
    """Return the first micro-batch, as the model takes it."""
    _, rows = loop.batches(0)[0]
    return {"input_ids": rows, "labels": rows}


def compare_peaks(
    natural: gk.checkpoint.Peak[float], plan: gk.checkpoint.Plan, planned: gk.checkpoint.Peak[float]
) -> Memory:
    """Put what was measured beside what was planned."""
    return Memory(
        natural_peak_bytes=natural.peak_bytes,
        budget_bytes=plan.budget_bytes,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=planned.peak_bytes,
        natural_timeline=tuple(natural.timeline),
        planned_timeline=tuple(planned.timeline),
        units=tuple((unit.name, unit.option, unit.options[0].saved_bytes) for unit in plan.units),
    )


def time_beside_torch(loop: Loop, steps: int) -> tuple[Timing, Timing]:
    """Time update cycle and whole step beside torch, on copies of the model and rows it has not met."""
    batches = [rows for _, rows in loop.batches(steps)]
    params = list(loop.model.parameters())
    gradients = [
        torch.autograd.grad(loop.model(input_ids=rows, labels=rows).loss / ACCUMULATE, params) for rows in batches
    ]
    return (
        time_update_cycle(loop.model, gradients, max_norm=MAX_NORM, rounds=CYCLE_ROUNDS),
        time_whole_step(loop.model, batches, max_norm=MAX_NORM, rounds=STEP_ROUNDS),
    )


def check_ledger(ledger: gk.rollback.Ledger, loop: Loop, path: Path) -> LedgerSummary:
    """Check what was recorded against what the parameters did."""
    report = ledger.verify(loop.model)
    conservation = ledger.conservation(loop.model)
    cosines = [entry.cosine for entry in report.compression]
    return LedgerSummary(
        conservation_error=conservation.error,
        conservation_bound=max(1e-5, 2e-8 * ledger.steps),
        size_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        sample_count=ledger.visits,
        checks=tuple((check.name, check.passed is True, check.detail) for check in report.checks),
        compression_cosine=sum(cosines) / len(cosines),
    )


if __name__ == "__main__":
    sys.exit(main())
