"""What the demo prints: the same figures as the report, in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

import gradkern as gk
from gradkern._page import mib

from .figures import LedgerSummary, Memory, Prediction, Setup, Timing, Training

__all__ = [
    "open_console",
    "print_ledger",
    "print_peaks",
    "print_plan",
    "print_prediction",
    "print_setup",
    "print_timings",
    "print_training",
]

_CONTINUATION = "bold blue"
_PLAIN_WIDTH = 120
_SNIPPET_WIDTH = 60


def open_console() -> Console:
    """Open the terminal; where there is none, lines are wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def print_setup(console: Console, setup: Setup) -> None:
    """Print what is about to run."""
    console.print(f"[bold]{setup.model}[/], {setup.parameter_count:,} parameters")
    console.print(f"{setup.data}\n{setup.batch}\n{setup.software}\n", highlight=False)


def print_plan(console: Console, plan: gk.checkpoint.Plan) -> None:
    """Print which units the plan recomputes."""
    recomputed = [unit.name for unit in plan.units if unit.option != "keep"]
    console.print(
        f"plan for {mib(plan.budget_bytes)}: recompute {len(recomputed)} of {len(plan.units)} units "
        f"({', '.join(recomputed) or 'none'})",
        highlight=False,
    )


def print_peaks(console: Console, memory: Memory) -> None:
    """Print the natural, allowed, predicted and measured peak side by side."""
    table = _table("Peak memory of one accumulation cycle", "", "bytes", "", "of natural")
    for name, size in (
        ("natural", memory.natural_peak_bytes),
        ("budget", memory.budget_bytes),
        ("predicted", memory.predicted_peak_bytes),
        ("measured", memory.measured_peak_bytes),
    ):
        table.add_row(name, f"{size:,}", mib(size), f"{size / memory.natural_peak_bytes:.1%}")
    console.print(table)


def print_training(console: Console, training: Training) -> None:
    """Print where the losses started and ended."""
    console.print(
        f"loss {training.losses[0]:.3f} → {training.loss_last:.3f}, held out {training.held_out_first:.3f} → "
        f"{training.held_out_last:.3f}, {len(training.losses)} steps in {training.seconds:.0f} s\n"
    )


def print_timings(console: Console, *timings: Timing) -> None:
    """Print gradkern's times beside torch's, with the bytes each moves by the count of its passes."""
    table = _table(
        "Beside torch's best way: fused AdamW, clip_grad_norm_(foreach=True), add_",
        *("", "gradkern", "torch", "ratio", "gradkern moves", "torch moves"),
    )
    for timing in timings:
        table.add_row(
            timing.name,
            f"{timing.ours_s * 1e3:.2f} ms",
            f"{timing.torch_s * 1e3:.2f} ms",
            f"{timing.ratio:.2f}×",
            "" if timing.ours_bytes is None else mib(timing.ours_bytes),
            "" if timing.torch_bytes is None else mib(timing.torch_bytes),
        )
    console.print(table)


def print_ledger(console: Console, ledger: LedgerSummary) -> None:
    """Print whether the ledger can be trusted."""
    console.print(
        f"conservation error {ledger.conservation_error:.2e}, bound {ledger.conservation_bound:.0e}; "
        f"{ledger.sample_count:,} samples in {mib(ledger.size_bytes)}, compressed to a mean cosine of "
        f"{ledger.compression_cosine:.3f}"
    )
    for name, passed, detail in ledger.checks:
        console.print(Text(f"  {'passed' if passed else 'FAILED'}  {name}: {detail}"))


def print_prediction(console: Console, prediction: Prediction) -> None:
    """Print the prompt, its continuation and the snippets behind it."""
    prompt = prediction.prompt
    console.print(f"\nHeld-out prompt {prompt.path}:{prompt.first_line}, [{_CONTINUATION}]and what the model says[/]")
    console.print(Text(prompt.text).append(prediction.continuation, style=_CONTINUATION))
    table = _table("The training snippets with the highest influence on it", "file and line", "score")
    table.add_column("text, from its beginning")
    for influence in prediction.influences:
        where = f"{influence.snippet.path}:{influence.snippet.first_line}"
        table.add_row(
            Text(where),
            f"{influence.score:+.2e}",
            Text(" ".join(influence.snippet.text.split())[:_SNIPPET_WIDTH]),
        )
    console.print(table)


def _table(title: str, first: str, *figures: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
