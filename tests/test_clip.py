"""clip_grad_norm_ and get_total_norm against torch.nn.utils and fp64 truth."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits

ORDERS = [2.0, 1, math.inf, "inf", 3.0, 0.5, 0, -math.inf, -1.0]


def params(dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((30, 50), (7,), (), (5000,))]
    for p in made:
        p.grad = (torch.randn(p.shape) * scale).to(dtype)
    made.append(nn.Parameter(torch.zeros(3, dtype=dtype)))  # has no gradient
    return made


@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm"])
def test_signatures_begin_with_torchs(name):
    def arguments(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    *ours, own = arguments(getattr(gk, name))
    assert ours == arguments(getattr(nn.utils, name))
    assert own == ("any_cut", False, inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("max_norm", [0.1, 1e6, 0.0])
@pytest.mark.parametrize("norm_type", ORDERS)
def test_clips_like_torch(max_norm, norm_type):
    ours, theirs = params(), params()
    got = gk.clip_grad_norm_(ours, max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)


def test_clips_by_the_norm_of_any_cut():
    ours, theirs = params(), params()
    assert same_bits(gk.clip_grad_norm_(ours, 0.1, any_cut=True), gk.clip_grad_norm_(theirs, 0.1))
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert same_bits(p.grad, q.grad)


def test_the_coefficient_is_rounded_once():
    for order, norm in ((1, 9.0), (math.inf, 5.0), (3, (3**3 + 1 + 5**3) ** (1 / 3))):
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.tensor([3.0, -1.0, 5.0])
        gk.clip_grad_norm_(p, 0.7, order)
        assert same_bits(p.grad, torch.tensor([3.0, -1.0, 5.0]) * torch.tensor(0.7 / (norm + 1e-6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", ORDERS)
def test_every_order_is_the_norm_of_fp64_rounded_to_fp32(dtype, norm_type):
    # Partly laid out with gaps and overlaps, which kernels do not read.
    wide = torch.randn(40, 50).to(dtype)
    grads = [torch.randn(30_000).to(dtype), wide[:, ::3], wide[0].expand(4, 50), wide.t(), torch.randn(()).to(dtype)]
    truth = nn.utils.get_total_norm([g.double() for g in grads], norm_type)
    got = gk.get_total_norm(grads, norm_type)
    assert got.dtype == torch.float32
    assert got.shape == ()
    assert got.item() == pytest.approx(truth.item(), rel=1e-7)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_are_what_torch_makes_of_them(norm_type, bad):
    grads = [torch.randn(5000), torch.randn(7)]
    grads[0][4500] = bad
    expected = nn.utils.get_total_norm([g.double() for g in grads], norm_type).float()
    got = gk.get_total_norm(grads, norm_type)
    if math.isfinite(expected):
        assert got.item() == pytest.approx(expected.item(), rel=1e-7)
    else:
        assert same_bits(got, expected)
        with pytest.raises(RuntimeError, match=rf"The total norm of order {float(norm_type)} .* is non-finite"):
            gk.get_total_norm(grads, norm_type, error_if_nonfinite=True)


def test_no_order_overflows_where_the_norm_does_not():
    grads = [torch.tensor([1e38, -1e38]), torch.tensor([1e-40, 0.0])]
    assert gk.get_total_norm(grads, 1).item() == pytest.approx(2e38)
    assert gk.get_total_norm(grads, math.inf).item() == pytest.approx(1e38)
    assert gk.get_total_norm(grads, 3).item() == pytest.approx(2 ** (1 / 3) * 1e38)
    assert gk.get_total_norm(grads, any_cut=True).item() == pytest.approx(2**0.5 * 1e38)
    tiny = [torch.full((3,), 2.0**-149)]
    assert gk.get_total_norm(tiny, 1).item() == 3 * 2.0**-149
    assert gk.get_total_norm(tiny, math.inf).item() == 2.0**-149


def test_any_cut_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match=r"any_cut is for the L2 norm, got norm_type 1\.0, expected 2"):
        gk.get_total_norm([torch.ones(3)], 1, any_cut=True)
    with pytest.raises(ValueError, match=r"number 1 is a Tensor of torch.float64"):
        gk.get_total_norm([torch.ones(3), torch.ones(3, dtype=torch.float64)], any_cut=True)
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"clip_grad_norm_: any_cut .* torch.complex64"):
        gk.clip_grad_norm_(p, 1.0, any_cut=True)
    assert gk.get_total_norm([], any_cut=True).item() == 0.0


@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
def test_tensors_without_elements_count_as_nothing(norm_type):
    assert gk.get_total_norm([torch.empty(0), torch.tensor([3.0])], norm_type).item() == 3.0
    assert gk.get_total_norm([torch.empty(0)], norm_type).item() == 0.0


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


def test_a_joint_norm_is_measured_again_where_gradients_have_changed():
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    clip = gk.clip.GlobalNorm(math.inf)
    opts = [gk.SGD([p], lr=0.1, clip=clip) for p in params]

    def give(*values):
        for p, value in zip(params, values, strict=True):
            p.grad = torch.full((4,), value)

    give(3.0, 4.0)
    opts[0].step()
    assert float(opts[0].grad_norm) == 10.0
    params[1].grad = torch.full((4,), 0.0)  # another tensor
    opts[1].step()
    assert float(opts[1].grad_norm) == 6.0
    params[1].grad.fill_(4.0)  # the same, edited
    opts[1].step()
    assert float(opts[1].grad_norm) == 10.0
    opts[0].step()
    params[1].grad.fill_(0.0)
    opts[0].step()  # twice in a row: a round of its own
    assert float(opts[0].grad_norm) == 6.0


def test_the_last_of_several_optimizers_clips_by_its_own_norm():
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    clip = gk.clip.GlobalNorm(0.5)
    first = gk.SGD([params[0]], lr=0.1, clip=clip)
    second = torch.optim.SGD([params[1]], lr=1.0)
    clip.attach(second)
    for p in params:
        p.grad = torch.full((4,), 3.0)
    del first
    second.step()
    assert float(params[1].detach().norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_a_threshold_near_the_epsilon_clips_as_in_torch(order):
    ours, theirs = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    for p in (ours, theirs):
        p.grad = torch.full((3,), 2e-6)
    gk.clip_grad_norm_([ours], 1e-6, order)
    torch.nn.utils.clip_grad_norm_([theirs], 1e-6, order)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_norms_of_tensors_that_require_grad_have_no_graph(order):
    leaf = torch.ones(5, requires_grad=True)
    assert not gk.get_total_norm([leaf, leaf * 2], order).requires_grad


def test_one_global_norm_for_several_optimizers_clips_by_their_joint_norm():
    torch.manual_seed(0)
    ours = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)]
    theirs = copy.deepcopy(ours)
    clip = gk.clip.GlobalNorm(0.5)
    opts = [
        gk.AdamW(ours[0].parameters(), lr=0.1, clip=clip),
        gk.SGD(ours[1].parameters(), lr=0.1, momentum=0.9, clip=clip),
        torch.optim.Muon(ours[2].parameters(), lr=0.1),
    ]
    clip.attach(opts[2])
    stock = [
        torch.optim.AdamW(theirs[0].parameters(), lr=0.1),
        torch.optim.SGD(theirs[1].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Muon(theirs[2].parameters(), lr=0.1),
    ]
    params = [[p for module in modules for p in module.parameters()] for modules in (ours, theirs)]
    for round_ in range(4):
        x = torch.randn(16, 8)
        for modules in (ours, theirs):
            torch.nn.Sequential(*modules)(x).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(params[1], 0.5)
        turn = [*opts[round_ % 3 :], *opts[: round_ % 3]]  # whoever steps first measures for all
        for opt in (*turn, *stock):
            opt.step()
            opt.zero_grad()
        torch.testing.assert_close(opts[0].grad_norm, norm)
        for p, q in zip(*params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
