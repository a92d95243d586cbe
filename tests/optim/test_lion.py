"""Lion against its paper, written out; torch has no namesake."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits


def paper(params, grads, momenta, lr, beta1, beta2, decay):
    """Chen et al. 2023, algorithm 2, in fp64."""
    for i, g in enumerate(grads):
        update = torch.sign(beta1 * momenta[i] + (1 - beta1) * g)
        params[i] = params[i] - lr * (update + decay * params[i])
        momenta[i] = beta2 * momenta[i] + (1 - beta2) * g


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_follows_the_paper_for_many_steps(decay, maximize):
    torch.manual_seed(0)
    start = [torch.randn(40, 50), torch.randn(7), torch.randn(())]
    ours = [nn.Parameter(t.clone()) for t in start]
    opt = gk.Lion(ours, lr=1e-3, betas=(0.9, 0.99), weight_decay=decay, maximize=maximize)
    theirs, momenta = [t.double() for t in start], [torch.zeros(t.shape, dtype=torch.float64) for t in start]
    for k in range(200):
        grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(k)) for t in start]
        for p, g in zip(ours, grads, strict=True):
            p.grad = g
        opt.step()
        paper(theirs, [(-g if maximize else g).double() for g in grads], momenta, 1e-3, 0.9, 0.99, decay)
    for p, q, m in zip(ours, theirs, momenta, strict=True):
        # 200 roundings; and fp32 may see another sign where a sum is next to nothing, one of 2 lr each.
        away = (p.detach().double() - q).abs()
        assert away.max() < 1e-2
        assert (away < 5e-5).double().mean() > 0.998
        got = opt.state[p]["exp_avg"].double()
        assert torch.allclose(got, m, atol=1e-6)


def test_a_zero_has_no_sign_and_a_nan_is_not_hidden():
    p = nn.Parameter(torch.ones(3))
    opt = gk.Lion([p], lr=0.5)
    p.grad = torch.tensor([0.0, -0.0, math.nan])
    opt.step()
    assert p[:2].tolist() == [1.0, 1.0]
    assert p[2].isnan()


@pytest.mark.parametrize("state", ["bf16", "int8"])
def test_a_momentum_of_few_bits_moves_the_same_way(state):
    torch.manual_seed(0)
    start = torch.randn(64, 64)
    target = torch.randn(64, 64)
    losses = {}
    for kind in (None, state):
        p = nn.Parameter(start.clone())
        opt = gk.Lion([p], lr=1e-2, state=kind)
        for _ in range(500):
            p.grad = p.detach() - target
            opt.step()
        losses[kind] = float((p.detach() - target).square().mean())
    assert losses[state] < 0.01 * float((start - target).square().mean())
    assert losses[state] < 2 * losses[None] + 1e-3


def test_state_has_half_of_what_adam_keeps():
    p = nn.Parameter(torch.ones(3))
    opt = gk.Lion([p])
    p.grad = torch.ones(3)
    opt.step()
    assert {name: value.shape for name, value in opt.state[p].items()} == {"exp_avg": (3,), "step": ()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        gk.Lion([nn.Parameter(torch.ones(1))], **options)


def test_clipping_changes_what_the_momentum_learns():
    p, q = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    clipped, scaled = gk.Lion([p], max_norm=1.0), gk.Lion([q])
    for k in range(5):
        g = torch.randn(8, generator=torch.Generator().manual_seed(k))
        p.grad = g
        norm = float(g.double().norm())
        q.grad = g * torch.tensor(min(1.0, 1.0 / (norm + 1e-6)), dtype=torch.float64).float()
        clipped.step()
        scaled.step()
    assert same_bits(p, q)
