"""What recording takes: training with and without a recorder, interleaved, each with the time until all is on disk.

The small classifier makes 4,000 steps of a quarter of a millisecond, the GPT-2 60 of a tenth of a second: a second and
six. Opening and closing a ledger, some 60 ms, are in the time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import gradkern as gk
from gradkern.rollback import Recorder

from .harness import Report
from .influence import digits_mlp

__all__ = ["run_overhead"]

Train = Callable[[nn.Module, torch.optim.Optimizer, Recorder | None], None]

STEPS = 60


def run_overhead(report: Report, rounds: int) -> None:
    """Of the small classifier of ``bench.influence`` and of a GPT-2."""
    for case, (model, train, samples) in {"digits, MLP": _mlp(), "GPT-2 of 0.87 M": _gpt2()}.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        nbytes = 0
        for turn in range(2 * max(5, rounds)):
            is_recorded = turn % 2 == 1
            took, nbytes = _timed(model, train, is_recorded=is_recorded)
            seconds[is_recorded].append(took)
        plain, recorded = (statistics.median(seconds[key]) for key in (False, True))
        report.add(case, "gradkern", "overhead", recorded / plain, "x")
        report.add(case, "gradkern", "overhead_min", min(seconds[True]) / min(seconds[False]), "x")
        report.add(case, "gradkern", "seconds_unrecorded", plain, "s")
        report.add(case, "gradkern", "ledger_bytes_per_sample_and_step", nbytes / samples, "B")


def _timed(make: Callable[[], nn.Module], train: Train, *, is_recorded: bool) -> tuple[float, int]:
    """Seconds, and bytes of the ledger."""
    model = make()
    optimizer = gk.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    if not is_recorded:
        start = time.perf_counter()
        train(model, optimizer, None)
        return time.perf_counter() - start, 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with gk.rollback.record(model, optimizer, Path(folder) / "ledger") as recorder:
            train(model, optimizer, recorder)
        return time.perf_counter() - start, gk.rollback.open(Path(folder) / "ledger").nbytes


def _mlp() -> tuple[Callable[[], nn.Module], Train, int]:
    setting = replace(digits_mlp(), epochs=200)
    batches = setting.batches(0)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder | None) -> None:
        for rows in batches:
            inputs, labels = setting.inputs[rows], setting.labels[rows]
            if recorder is None:
                nn.functional.cross_entropy(model(inputs), labels).backward()
            else:
                with recorder.batch(rows):
                    nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return lambda: setting.model(0), train, sum(map(len, batches))


def _gpt2() -> tuple[Callable[[], nn.Module], Train, int]:
    from transformers import GPT2Config, GPT2LMHeadModel  # lazy: slow to import

    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (16 * STEPS, 64), generator=generator)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder | None) -> None:
        for rows in torch.arange(len(data)).split(16):
            if recorder is None:
                model(input_ids=data[rows], labels=data[rows]).loss.backward()
            else:
                with recorder.batch(rows):
                    model(input_ids=data[rows], labels=data[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return make, train, len(data)
