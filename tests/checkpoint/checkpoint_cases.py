"""Small real models that the checkpoint tests train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from gradkern.loss import compute_loss


@dataclass
class Case:
    """A model with a batch and a loss."""

    model: nn.Module
    batch: Any
    loss_fn: Any = None

    def loss(self, model: nn.Module | None = None) -> torch.Tensor:
        return compute_loss(self.model if model is None else model, self.batch, self.loss_fn)

    def cycle(self, optimizer: torch.optim.Optimizer | None = None, accumulate: int = 1) -> None:
        for _ in range(accumulate):
            (self.loss() / accumulate).backward()
        if optimizer is not None:
            optimizer.step()
        self.model.zero_grad()


def gpt2(dropout: float = 0.1, layers: int = 4) -> Case:
    transformers = pytest.importorskip("transformers", reason="the GPT-2 tests use the real architecture")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers,
        n_embd=32,
        n_head=4,
        vocab_size=128,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        # As under a plan: a cache copies the keys, and some matrix products round otherwise for the other layout.
        use_cache=False,
    )
    ids = torch.randint(0, 128, (4, 64))
    return Case(transformers.GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids})


def cnn() -> Case:
    torch.manual_seed(1)
    blocks = []
    channels = 3
    for _ in range(4):
        blocks.append(
            nn.Sequential(
                nn.Conv2d(channels, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(inplace=True),
            )
        )
        channels = 8
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    batch = torch.randn(8, 3, 24, 24), torch.randint(0, 10, (8,))
    return Case(model.train(), batch, nn.functional.cross_entropy)


def mlp() -> Case:
    torch.manual_seed(2)
    blocks = [
        nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 64))
        for width in (256, 64, 512, 128, 256)
    ]
    model = nn.Sequential(nn.Linear(16, 64), *blocks, nn.Linear(64, 1))
    return Case(model.train(), (torch.randn(128, 16), torch.randn(128, 1)), nn.functional.mse_loss)


class Block(nn.Module):
    """Holds about as much inside as what flows through, so that inputs are what is left to save."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(32, 32), nn.Dropout(0.1)
        self.scale = lambda: 1.0

    def forward(self, x):
        return x + self.drop(torch.tanh(self.linear(x) * self.scale()))


def deep(count: int = 12, shape: tuple[int, ...] = (512, 32)) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(count)))
    return Case(model.train(), torch.randn(shape), lambda y, x: (y - x).square().mean())


CASES = {"gpt2": gpt2, "cnn": cnn, "mlp": mlp}
