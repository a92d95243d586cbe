"""GradAccumulator: fp32 gradients whatever the parameters, any optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.grad_fold import known_partials
from gradkern.testing import same_bits


def tiny(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 2)).to(dtype)


def loss_of(model, seed):
    dtype = model[0].weight.dtype
    return model(torch.randn(8, 40, generator=torch.Generator().manual_seed(seed)).to(dtype)).float().square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_accumulate_in_fp32(dtype):
    model = tiny(dtype)
    params = list(model.parameters())
    each = [torch.autograd.grad(loss_of(model, k), params) for k in range(16)]
    accumulator = gk.GradAccumulator(params)
    for k in range(16):
        loss_of(model, k).backward()
    for i, p in enumerate(params):
        expected = torch.zeros(p.shape)
        for grads in each:
            expected = expected + grads[i].float()
        assert p.grad.dtype == torch.float32
        assert same_bits(p.grad, expected)
    truth = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt()
    assert accumulator.norm().item() == pytest.approx(truth.item(), rel=1e-7)


def test_first_micro_batch_overwrites_and_keeps_what_the_user_holds():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    kept = model[0].weight.grad
    copy = kept.clone()
    view = model[2].weight.grad.detach()[:1]
    view_copy = view.clone()
    accumulator.zero_grad()
    loss_of(model, 1).backward()
    assert same_bits(kept, copy)
    assert same_bits(view, view_copy)
    fresh = tiny(torch.bfloat16)
    grads = torch.autograd.grad(loss_of(fresh, 1), list(fresh.parameters()))
    assert all(same_bits(p.grad, g.float()) for p, g in zip(model.parameters(), grads, strict=True))
    address = model[2].bias.grad.data_ptr()
    accumulator.zero_grad()
    loss_of(model, 2).backward()
    assert model[2].bias.grad.data_ptr() == address, "a buffer that nobody else sees is used again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_torch_optimizer(dtype):
    model, plain = tiny(dtype), tiny(dtype)
    accumulator = gk.GradAccumulator(model.parameters())
    opt, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    for step in range(3):
        for k in range(4):
            (loss_of(model, 4 * step + k) / 4).backward()
            (loss_of(plain, 4 * step + k) / 4).backward()
        norm = accumulator.clip_grad_norm_(0.05)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float32 else 2e-2)
        accumulator.cast_grads_()
        assert all(p.grad.dtype == dtype for p in model.parameters())
        opt.step()
        reference.step()
        accumulator.zero_grad()
        reference.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        # bf16: autograd accumulates in bf16, so that a few weights near zero land one rounding step of lr * grad apart.
        assert torch.allclose(
            p, q, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-7 if dtype == torch.float32 else 1e-3
        )


def test_explicit_gradients():
    model = tiny()
    params = list(model.parameters())
    accumulator = gk.GradAccumulator(params)
    first = [torch.randn_like(p) for p in params]
    second = [torch.randn_like(p).bfloat16() for p in params]
    accumulator.accumulate_([*first[:-1], None])
    assert params[-1].grad is None
    accumulator.accumulate_(second)
    for p, a, b in zip(params[:-1], first, second, strict=False):
        assert same_bits(p.grad, a + b.float())
    assert same_bits(params[-1].grad, second[-1].float())
    with pytest.raises(ValueError, match="got 1 gradients, expected 4"):
        accumulator.accumulate_([None])


def test_detach_gives_autograd_its_gradients_back():
    model = tiny(torch.bfloat16)
    accumulator = gk.GradAccumulator(model.parameters())
    loss_of(model, 0).backward()
    accumulator.detach()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    loss_of(model, 1).backward()
    torch.optim.AdamW(model.parameters()).step()


def test_bad_parameters():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        gk.GradAccumulator([frozen])
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        gk.GradAccumulator([])
    with pytest.raises(ValueError, match=r"params\[1\] has dtype torch\.float64"):
        gk.GradAccumulator([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))])


def test_norm_of_a_folded_list_reaches_the_optimizer_and_edits_are_seen():
    model = tiny()
    params = list(model.parameters())
    opt = gk.AdamW(params, max_norm=1.0)
    opt.detach()
    accumulator = gk.GradAccumulator(params)
    for seed in range(3):
        accumulator.accumulate_([torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in params])
    expected = gk.get_total_norm([p.grad for p in params])
    assert known_partials([p.grad for p in params]) is not None
    assert same_bits(accumulator.norm(), expected)
    opt.step()
    assert same_bits(opt.grad_norm, expected)

    params[1].grad.mul_(2.0)
    assert known_partials([p.grad for p in params]) is None
    params[1].grad = torch.ones_like(params[1])
    expected = gk.get_total_norm([p.grad for p in params])
    opt.step()
    assert same_bits(opt.grad_norm, expected)
    assert same_bits(accumulator.norm(), expected)
    assert known_partials([p.grad for p in params][:-1]) is None
    assert known_partials([]) is None


def test_accumulating_on_after_cast_grads_widens_again():
    model = tiny(torch.bfloat16)
    params = list(model.parameters())
    accumulator = gk.GradAccumulator(params)
    loss_of(model, 0).backward()
    accumulator.cast_grads_()
    before = [p.grad.float() for p in params]
    more = [torch.ones_like(p) for p in params]
    accumulator.accumulate_(more)
    for p, b, m in zip(params, before, more, strict=True):
        assert same_bits(p.grad, b + m.float())


def test_clipping_after_unscale_reads_the_gradients_again():
    model = tiny()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = gk.GradAccumulator(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(3):
        scaler.scale(loss_of(model, k)).backward()
    scaler.unscale_(opt)
    truth = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    assert accumulator.clip_grad_norm_(1e9).item() == pytest.approx(truth, rel=1e-6)


def test_a_bad_gradient_is_refused_before_any_is_folded():
    model = tiny()
    params = list(model.parameters())
    accumulator = gk.GradAccumulator(params)
    good = [torch.ones_like(p) for p in params]
    with pytest.raises(ValueError, match=r"gradient 1 is torch\.float32 of shape \(3,\)"):
        accumulator.accumulate_([good[0], torch.ones(3), *good[2:]])
    assert all(p.grad is None for p in params)
