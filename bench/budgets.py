"""What a budget of bytes keeps of a transformer's gradients, and what its influence is still worth.

``digits, transformer``: the datamodeling scores of ``bench.influence`` for a transformer of 7,034 parameters that reads
scikit-learn's digits row by row, recorded by rank and with budgets; 515 and 48 bytes are to its size what 64 kB and
6 kB are to that of the GPT-2. Means over three recorded seeds; ``_interval`` is half the width of the 95 % interval of
that mean.

``GPT-2 of 0.87 M, text``: trained on the source of Python's ``argparse``, 128 pieces of 64 bytes, three times, without
dropout. Retraining it hundreds of times takes hours, so its influence is compared with that of a ledger that keeps all
64 token rows of every factor: ``ref_agreement`` and ``direct_agreement`` are the rank correlations over samples of the
scores with those of that ledger, means over 16 queries that were not trained on. ``delta_cosine`` is the cosine of
gradient and record after both were multiplied by the preconditioner, of the first sample of every fifth step, the whole
model as one vector; ``cosine`` is the mean over streams that ``Ledger.verify`` gives, where one without a record
counts 0. ``record_bytes`` are a visit's, without what the ledger holds of steps and of the run.
"""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern.rollback import Ledger
from gradkern.rollback._reading import read_segments
from gradkern.rollback._smoothing import unsmooth

from .harness import Report
from .influence import (
    Setting,
    datamodeling_score,
    digits_mlp,
    kept_samples,
    rank_correlation,
    record_run,
    retrained_losses,
)

__all__ = ["SequenceClassifier", "digits_transformer", "run_budgets"]

SEEDS = (0, 1, 2)
SHARES = (0.01, 0.1, 0.5)
DIGITS: Mapping[str, dict[str, int]] = {
    "rank 2": {"rank": 2},
    "515 B": {"bytes_per_visit": 515},
    "48 B": {"bytes_per_visit": 48},
}
TEXT: Mapping[str, dict[str, int]] = {
    "rank 2": {"rank": 2},
    "rank 3": {"rank": 3},
    "64 kB": {"bytes_per_visit": 64_000},
    "24 kB": {"bytes_per_visit": 24_000},
    "6 kB": {"bytes_per_visit": 6_000},
}
TOKENS, SAMPLES, QUERIES, EPOCHS, BATCH_SIZE = 64, 128, 16, 3, 16

# Of a step's first sample the exact gradient is taken every so many steps; not at the first, where Adam makes full
# steps of what rounding leaves of the attention keys' biases, which is another for every order of summing.
_EXACT_EVERY = 5

# Of Student's t with two degrees of freedom, 97.5 %.
_T = 4.303


class _Block(nn.Module):
    """Attention and two layers, each after a norm, added to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        parts = self.attention(self.before_attention(inputs)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        inputs = inputs + self.back((weights @ value).transpose(-3, -2).flatten(-2))
        return inputs + self.layers(self.before_layers(inputs))


class SequenceClassifier(nn.Module):
    """A transformer that reads eight rows of eight pixels."""

    def __init__(self, width: int = 16, heads: int = 2, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(8, width), nn.Embedding(8, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Of pixels, shape ``(..., 64)``, the logits of ten classes."""
        rows = self.embed(pixels.unflatten(-1, (8, 8)))
        # Shape (1, 8): of all samples, as recording knows it.
        found = self.blocks(rows + self.positions(torch.arange(8).unsqueeze(0)))
        return self.head(self.norm(found).mean(dim=-2))


def digits_transformer() -> Setting:
    """400 of scikit-learn's digits, a transformer of 7,034 parameters."""
    setting = digits_mlp()
    return replace(
        setting,
        make_model=SequenceClassifier,
        inputs=setting.inputs[:400],
        labels=setting.labels[:400],
        epochs=8,
        lr=5e-3,
        batch_size=25,
    )


def run_budgets(report: Report) -> None:
    """Both models."""
    _digits(report)
    _text(report)


def _digits(report: Report) -> None:
    case, setting = "digits, transformer", digits_transformer()
    found: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        scores: dict[str, Tensor] = {}
        for name, options in DIGITS.items():
            with tempfile.TemporaryDirectory() as folder:
                model, ledger = record_run(setting, seed, Path(folder) / "ledger", **options)
                for estimator in ("ref", "direct"):
                    asked = ledger.scores(
                        model, setting.queries(), loss_fn=nn.functional.cross_entropy, estimator=estimator
                    )
                    scores[f"gradkern {estimator}, {name}"] = asked.scores
                if seed == SEEDS[0]:
                    report.add(case, f"gradkern, {name}", "record_bytes", _record_bytes(ledger), "B")
                    right = (model(setting.test_inputs).argmax(1) == setting.test_labels).float().mean()
                    report.add(case, f"gradkern, {name}", "test_accuracy", 100 * float(right), "%")
        for share in SHARES:
            kept = kept_samples(len(setting.inputs), share, seed)
            losses = retrained_losses(setting, seed, kept)
            for system, each in scores.items():
                value = datamodeling_score(each, kept, losses)
                found.setdefault((system, f"lds_drop{round(100 * share)}"), []).append(value)
    for (system, metric), values in found.items():
        report.add(case, system, metric, statistics.fmean(values), "")
        report.add(case, system, f"{metric}_interval", _T * statistics.stdev(values) / math.sqrt(len(values)), "")


def _text(report: Report) -> None:
    case, text = "GPT-2 of 0.87 M, text", _pieces()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth: dict[int, list[Tensor]] = {}
        model, exact = _record_gpt2(text[:SAMPLES], folder / "exact", {"rank": TOKENS}, truth)
        report.add(case, f"gradkern, rank {TOKENS}", "record_bytes", _record_bytes(exact), "B")
        # Below 1 by rounding to int8 alone.
        ceiling = statistics.fmean(_delta_cosines(exact, truth))
        report.add(case, f"gradkern, rank {TOKENS}", "delta_cosine", ceiling, "")
        queries = [(piece, piece) for piece in text[SAMPLES:].split(1)]
        expected = {each: _scores(model, exact, queries, each) for each in ("ref", "direct")}
        for setting, options in TEXT.items():
            system = f"gradkern, {setting}"
            model, ledger = _record_gpt2(text[:SAMPLES], folder / setting.replace(" ", "-"), options)
            report.add(case, system, "record_bytes", _record_bytes(ledger), "B")
            report.add(case, system, "ledger_bytes", ledger.nbytes / ledger.visits, "B")
            cosine = statistics.fmean(each.cosine for each in ledger.verify(model).compression)
            report.add(case, system, "cosine", cosine, "")
            report.add(case, system, "delta_cosine", statistics.fmean(_delta_cosines(ledger, truth)), "")
            for estimator, scores in expected.items():
                found = _scores(model, ledger, queries, estimator)
                report.add(case, system, f"{estimator}_agreement", rank_correlation(found.t(), scores.t()), "")


def _pieces() -> Tensor:
    """Of the text, shape ``(SAMPLES + QUERIES, TOKENS)``."""
    source = inspect.getsource(argparse).encode()[: (SAMPLES + QUERIES) * TOKENS]
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long().view(-1, TOKENS)


def _record_gpt2(
    text: Tensor, path: Path, options: Mapping[str, int], truth: dict[int, list[Tensor]] | None = None
) -> tuple[nn.Module, Ledger]:
    """Train and record; ``truth`` takes by step the exact gradients of the first sample, as part of its batch's."""
    from transformers import GPT2Config, GPT2LMHeadModel  # lazy: slow to import

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": TOKENS, "n_embd": 128, "n_layer": 4, "n_head": 4}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLMLoss"))
    optimizer = gk.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    with gk.rollback.record(model, optimizer, path, **options) as recorder:
        for step, rows in enumerate(torch.arange(len(text)).repeat(EPOCHS).split(BATCH_SIZE)):
            if truth is not None and step % _EXACT_EVERY == _EXACT_EVERY - 1:
                with recorder.paused():
                    loss = model(input_ids=text[rows[:1]], labels=text[rows[:1]]).loss / BATCH_SIZE
                    truth[step] = list(torch.autograd.grad(loss, list(model.parameters())))
            with recorder.batch(rows):
                model(input_ids=text[rows], labels=text[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, gk.rollback.open(path)


def _scores(model: nn.Module, ledger: Ledger, queries: list[tuple[Tensor, Tensor]], estimator: str) -> Tensor:
    def loss(output: Any, piece: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), piece[:, 1:].flatten())

    return ledger.scores(model, queries, loss_fn=loss, estimator=estimator).scores


def _record_bytes(ledger: Ledger) -> float:
    return sum(ledger.layer_bytes().values()) / ledger.visits


def _delta_cosines(ledger: Ledger, truth: Mapping[int, list[Tensor]]) -> list[float]:
    """Of the exact gradients by step with their records, both times the preconditioner of that step."""
    layout, cosines, first_step = ledger._layout, [], 0
    for segment in read_segments(ledger._store):
        for step, gradients in truth.items():
            if not 0 <= step - first_step < segment.steps:
                continue
            visit = int(segment.visit_bounds[step - first_step])
            recorded = [torch.zeros(1, *gradient.shape) for gradient in gradients]
            for stream, record in segment.records.items():
                own = record.between(visit, int(segment.visit_bounds[step - first_step + 1]))
                own = own.take(own.visit == visit)
                own.add_to(recorded[layout.streams[stream].parameter], torch.ones(1, len(own.visit)))
            steps = [
                unsmooth([part[step - first_step] for part in segment.preconditioners[index]], info.shape)
                for index, info in enumerate(layout.parameters)
            ]
            pairs = zip((gradients, [each[0] for each in recorded]), (steps, steps), strict=True)
            flat = [torch.cat([(a * b).flatten() for a, b in zip(*pair, strict=True)]) for pair in pairs]
            cosines.append(float(nn.functional.cosine_similarity(*flat, dim=0)))
        first_step += segment.steps
    return cosines
