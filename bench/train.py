"""Suite ``train``: forward, backward, clip, update, zero: the step that a user waits for, beside torch's ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import gradkern as gk

from .harness import Report, interleave
from .systems import MAX_NORM, demo_module, torch_clip_step, torch_trick_step

__all__ = ["CASES", "Training", "run"]


@dataclass(frozen=True)
class Training:
    """A model and the micro-batches of one update.

    Attributes:
        model: All systems train this one: two copies differ by where they lie in memory more than by their optimizers.
        loss: Of the model on a micro-batch.
        micro_batches: What it is called with.
    """

    model: nn.Module
    loss: Callable[[torch.Tensor], torch.Tensor]
    micro_batches: list[torch.Tensor]


def _language_model(model: nn.Module, rows: int, length: int, vocabulary: int, count: int) -> Training:
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    batches = [torch.randint(vocabulary, (rows, length), generator=generator).to(device) for _ in range(count)]
    return Training(model, lambda ids: model(input_ids=ids, labels=ids).loss, batches)


def many_tensors(device: torch.device) -> Training:
    """250 residual blocks of a norm and two linear layers: 1,500 tensors, 2.7 M parameters."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(72), nn.Linear(72, 72), nn.Linear(72, 72)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(250))).to(device)
    x = torch.randn(16, 72, generator=torch.Generator().manual_seed(1)).to(device)
    return Training(model, lambda batch: model(batch).square().mean(), [x])


def gpt2_124m(device: torch.device) -> Training:
    """GPT-2 small on one row of 128 tokens: an update after a short backward, where it weighs most."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return _language_model(model.to(device), 1, 128, config.vocab_size, 1)


def demo(device: torch.device) -> Training:
    """The model of ``make demo``, with its 4 micro-batches."""
    model = demo_module("model").build_model(layers=8, width=192, length=256, seed=0).to(device)
    training = demo_module("training")
    return _language_model(model, training.ROWS_PER_MICRO_BATCH, 256, 256, training.ACCUMULATE)


CASES: dict[str, Callable[[torch.device], Training]] = {
    "many_tensors_1500": many_tensors,
    "gpt2_124m": gpt2_124m,
    "demo": demo,
}


def run(report: Report, rounds: int) -> None:
    """Time every case."""
    for case, make in CASES.items():
        systems = _systems(make(report.device))
        timings = interleave(systems, report.device, rounds=rounds)
        report.add_times(case, "train_step", timings, systems)
        best = min(list(systems)[1:], key=lambda other: min(timings[other]))
        report.add_ratio(case, "train_step_speedup", timings, best, "gradkern")


def _systems(training: Training) -> dict[str, Callable[[], object]]:
    params = list(training.model.parameters())
    ours = gk.AdamW(params, lr=1e-4, max_norm=MAX_NORM)
    ours.detach()  # in the turns of others, backward is autograd's own

    def whole(update: Callable[[], object]) -> None:
        for batch in training.micro_batches:
            (training.loss(batch) / len(training.micro_batches)).backward()
        update()
        ours.zero_grad()

    def gradkern() -> None:
        ours.attach()
        whole(ours.step)
        ours.detach()

    clip_fused, trick = torch_clip_step(params), torch_trick_step(params)
    return {
        "gradkern": gradkern,
        "torch clip + fused": lambda: whole(clip_fused),
        "torch grad_scale + fused": lambda: whole(trick),
    }
