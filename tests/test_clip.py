"""clip_grad_norm_ and get_total_norm against torch.nn.utils and fp64 truth."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits


def params(dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((30, 50), (7,), (), (5000,))]
    for p in made:
        p.grad = (torch.randn(p.shape) * scale).to(dtype)
    made.append(nn.Parameter(torch.zeros(3, dtype=dtype)))  # has no gradient
    return made


@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm"])
def test_signatures_are_torchs(name):
    def arguments(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(getattr(gk, name)) == arguments(getattr(nn.utils, name))


@pytest.mark.parametrize("max_norm", [0.1, 1e6, 0.0])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
def test_clips_like_torch(max_norm, norm_type):
    ours, theirs = params(), params()
    got = gk.clip_grad_norm_(ours, max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_norm_is_fp32_and_true(dtype):
    made = params(dtype)
    grads = [p.grad for p in made[:-1]]
    truth = torch.cat([g.double().flatten() for g in grads]).norm().item()
    norm = gk.get_total_norm(grads)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(truth, rel=1e-7)


def test_mixed_dtypes_are_one_norm():
    grads = [torch.randn(50), torch.randn(50).bfloat16(), torch.randn(50).half()]
    truth = torch.cat([g.double() for g in grads]).norm().item()
    assert gk.get_total_norm(grads).item() == pytest.approx(truth, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_torchs(dtype):
    grads = [torch.randn(20, dtype=dtype), torch.randn(3, dtype=dtype)]
    assert same_bits(gk.get_total_norm(grads), nn.utils.get_total_norm(grads))


def test_no_overflow_where_torch_overflows():
    grads = [torch.full((4,), 1e20)]
    assert gk.get_total_norm(grads).item() == pytest.approx(2e20)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_error_if_nonfinite_is_raised_before_anything_is_scaled(bad):
    made = params()
    made[0].grad[0, 0] = bad
    before = [p.grad.clone() for p in made[:-1]]
    with pytest.raises(RuntimeError, match="is non-finite"):
        gk.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
    assert all(same_bits(p.grad, g) for p, g in zip(made[:-1], before, strict=True))
    assert not math.isfinite(gk.clip_grad_norm_(made, 1.0).item())


def test_empty_and_single():
    assert gk.get_total_norm([]).item() == 0.0
    assert gk.clip_grad_norm_([], 1.0).item() == 0.0
    assert gk.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0
    assert gk.get_total_norm(torch.full((4,), 2.0)).item() == 4.0


def test_generator_of_parameters():
    made = params()
    expected = gk.get_total_norm([p.grad for p in made[:-1]])
    assert same_bits(gk.clip_grad_norm_((p for p in made), 1.0), expected)


def test_clipping_bumps_the_version():
    made = params()
    version = made[0].grad._version
    gk.clip_grad_norm_(made, 0.1)
    assert made[0].grad._version > version
