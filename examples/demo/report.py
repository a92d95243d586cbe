"""The report: one self-contained HTML page, with its style and its charts inside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from gradkern._page import cards, document, figure, mib, section, table

from . import plots
from .corpus import Snippet
from .figures import Figures, LedgerSummary, Memory, Prediction, Timing, Training

__all__ = ["render_report"]

_STYLE_SHEET = Path(__file__).with_name("report.css")


def render_report(figures: Figures, *, max_norm: float) -> str:
    """Return the page for a run; every text that came from a file or a model is escaped.

    Args:
        figures: What the run found out.
        max_norm: Clipping threshold, marked in the chart of gradient norms.
    """
    setup = figures.setup
    return document(
        "What one training run did",
        f"{setup.model}, {setup.parameter_count / 1e6:.2f} M parameters, from random weights. {setup.data}. "
        f"{setup.batch}.",
        (
            _cards(figures),
            _memory_section(figures.memory),
            _training_section(figures.training, max_norm),
            _timing_section((figures.update_cycle, figures.whole_step)),
            _influence_section(figures.prediction),
            _ledger_section(figures.ledger),
        ),
        footer=f"{setup.software}. All figures are of this one run.",
        style=_STYLE_SHEET.read_text(encoding="utf-8"),
    )


def _cards(figures: Figures) -> str:
    memory, training = figures.memory, figures.training
    share = memory.measured_peak_bytes / memory.natural_peak_bytes
    headline = (
        ("peak memory", f"{share:.0%}", f"of natural: {mib(memory.measured_peak_bytes)}"),
        ("loss", f"{training.loss_last:.2f}", f"nats per byte, from {training.losses[0]:.2f}"),
        ("update cycle", f"{figures.update_cycle.ratio:.2f}×", "as fast as torch's best"),
        ("whole step", f"{figures.whole_step.ratio:.2f}×", "forward, backward and update"),
        ("conservation error", f"{figures.ledger.conservation_error:.1e}", "of what the ledger recorded"),
    )
    return cards("headline", headline)


def _memory_section(memory: Memory) -> str:
    rows = (
        ("natural peak", memory.natural_peak_bytes),
        ("budget", memory.budget_bytes),
        ("predicted peak", memory.predicted_peak_bytes),
        ("measured peak", memory.measured_peak_bytes),
    )
    chart = plots.memory_chart(
        "memory", memory.natural_timeline, memory.planned_timeline, budget_bytes=memory.budget_bytes
    )
    units = "".join(
        f'<span class="unit {escape(option)}" title="{mib(saved)} kept for backward">'
        f"{escape(name)}: {escape(option)}</span>"
        for name, option, saved in memory.units
    )
    return section(
        "memory",
        "Memory",
        "The plan recomputes some blocks in backward to keep a whole accumulation cycle under the budget.",
        figure("memory-timeline", chart, "Live bytes while one optimizer step runs."),
        table(
            ("", "bytes", "", "of natural"),
            [(label, f"{size:,}", mib(size), f"{size / memory.natural_peak_bytes:.1%}") for label, size in rows],
            numbers={1, 2, 3},
        ),
        f'<div class="units">{units}</div>',
    )


def _training_section(training: Training, max_norm: float) -> str:
    loss = plots.line_chart("loss", training.losses, color=plots.BLUE, y_label="loss, nats per byte")
    norm = plots.line_chart("norm", training.grad_norms, color=plots.ORANGE, y_label="gradient norm", limit=max_norm)
    return section(
        "training",
        "Training",
        f"{len(training.losses)} optimizer steps in {training.seconds:.0f} s, "
        f"{training.tokens / training.seconds:,.0f} bytes of text a second with recording on. Held-out loss: "
        f"{training.held_out_first:.3f} before, {training.held_out_last:.3f} after.",
        '<div class="pair">'
        + figure("loss-curve", loss, "Loss of every step and its running mean.")
        + figure("norm-curve", norm, "Gradient norm before clipping, and its running mean.")
        + "</div>",
    )


def _timing_section(timings: Sequence[Timing]) -> str:
    return section(
        "timing",
        "Speed beside torch",
        "Both ways ran in turn in the same process on the same model; each figure is the best round. "
        "Bytes moved are counted from the passes over memory that each way makes, not measured.",
        table(
            ("", "gradkern", "torch", "ratio", "bytes moved, gradkern", "bytes moved, torch", "rounds"),
            [
                (
                    timing.name,
                    f"{timing.ours_s * 1e3:.2f} ms",
                    f"{timing.torch_s * 1e3:.2f} ms",
                    f"{timing.ratio:.2f}×",
                    "" if timing.ours_bytes is None else mib(timing.ours_bytes),
                    "" if timing.torch_bytes is None else mib(timing.torch_bytes),
                    str(timing.rounds),
                )
                for timing in timings
            ],
            numbers=set(range(1, 7)),
        ),
    )


def _influence_section(prediction: Prediction) -> str:
    rows = "".join(
        f'<tr><td class="number">{influence.score:+.2e}</td>'
        f"<td><code>{_place(influence.snippet)}</code></td>"
        f"<td><pre>{escape(influence.snippet.text)}</pre></td></tr>"
        for influence in prediction.influences
    )
    return section(
        "influence",
        "Who taught it that",
        "A prompt from a file that was held out, what the model went on to write, and the training snippets "
        "that lowered its loss on that continuation the most.",
        f'<p class="note">Prompt: <code>{_place(prediction.prompt)}</code>. '
        'The continuation is <span class="continuation">blue</span>.</p>',
        f'<pre id="prediction">{escape(prediction.prompt.text)}'
        f'<span class="continuation">{escape(prediction.continuation)}</span></pre>',
        '<div class="scroll"><table id="influence-table"><thead><tr>'
        '<th class="number">score, nats</th><th>file and line</th><th>training snippet</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
    )


def _ledger_section(ledger: LedgerSummary) -> str:
    checks = "".join(
        f'<tr><td>{escape(name)}</td><td class="{"passed" if passed else "failed"}">'
        f"{'passed' if passed else 'failed'}</td><td>{escape(detail)}</td></tr>"
        for name, passed, detail in ledger.checks
    )
    return section(
        "ledger",
        "The ledger",
        f"{ledger.sample_count:,} training samples recorded in {mib(ledger.size_bytes)}. What they changed "
        f"adds up to what the parameters moved, to a relative error of {ledger.conservation_error:.2e} "
        f"(bound {ledger.conservation_bound:.1e}). On disk the records are compressed: their mean cosine "
        f"with the exact gradients is {ledger.compression_cosine:.3f}.",
        f"<table><thead><tr><th>check</th><th></th><th></th></tr></thead><tbody>{checks}</tbody></table>",
    )


def _place(snippet: Snippet) -> str:
    return f"{escape(snippet.path)}:{snippet.first_line}"
