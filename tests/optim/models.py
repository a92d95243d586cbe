"""Small models whose parameters cover the shapes optimizers meet, and every optimizer of ours."""

from __future__ import annotations

import torch
from torch import nn

import gradkern as gk


def _maker(optimizer, **defaults):
    return lambda params, **options: optimizer(params, **{**defaults, **options})


OPTIMIZERS = {
    "AdamW": _maker(gk.AdamW, lr=1e-2),
    "Adam": _maker(gk.Adam, lr=1e-2, weight_decay=0.1),
    "SGD": _maker(gk.SGD, lr=1e-2, momentum=0.9),
    "Lion": _maker(gk.Lion, lr=1e-3),
}


def mlp(seed: int = 0) -> nn.Module:
    """One parameter above the fold threshold, biases and norms far below it."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 600), nn.GELU(), nn.LayerNorm(600), nn.Linear(600, 600), nn.Linear(600, 3))


def micro_batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(micro_batch(seed)).square().mean()


def one(value: float = 1.0, dtype: torch.dtype = torch.float32, size: int = 4) -> nn.Parameter:
    """A parameter, and a gradient of ones."""
    p = nn.Parameter(torch.full((size,), value, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p
