"""Small models whose parameters cover the shapes optimizers meet."""

from __future__ import annotations

import torch
from torch import nn


def mlp(seed: int = 0) -> nn.Module:
    """One parameter above the fold threshold, biases and norms far below it."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 600), nn.GELU(), nn.LayerNorm(600), nn.Linear(600, 600), nn.Linear(600, 3))


def micro_batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(micro_batch(seed)).square().mean()
