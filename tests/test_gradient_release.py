"""Gradients given up in backward: exact norm, little memory, training as ever, errors before anything is changed."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern import functional
from gradkern.ops._chunks import chunk_count
from gradkern.ops._step.codecs import state_blocks
from gradkern.testing import same_bits


def deep(dtype=torch.float32, layers=32, width=96):
    torch.manual_seed(0)
    body = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
    return nn.Sequential(*body).to(dtype)


def loss_of(model, seed=0):
    width, dtype = model[0].in_features, model[0].weight.dtype
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return model(x).float().square().mean()


def stash_of(grad, key):
    codes = torch.empty_like(grad, dtype=torch.uint8)
    exponents = torch.empty(state_blocks(grad.numel()), dtype=torch.uint8)
    return codes, exponents, functional.stash_([grad], [codes], [exponents], [key])


def unstash_of(grad, key):
    codes, exponents, _ = stash_of(grad, key)
    out = torch.empty_like(grad)
    functional.unstash_([out], [codes], [exponents], torch.tensor(1.0))
    return out


# --- the ops ------------------------------------------------------------------------------------------------------


def test_partials_are_those_of_the_full_gradient():
    grad = torch.randn(9001)
    partials = stash_of(grad, 7)[2]
    assert len(partials) == chunk_count(9001)
    assert same_bits(partials, functional.sumsq([grad]))


def test_rounding_is_unbiased_and_within_one_code():
    grad = torch.randn(640, generator=torch.Generator().manual_seed(1))
    keys = 2000
    drawn = torch.stack([unstash_of(grad, key * 2654435761 % 2**32) for key in range(keys)]).double()
    assert ((drawn - grad).abs() <= grad.abs() / 8 + 2**-13).all()
    # The deviation is at most half a step of an eighth, also of the largest of a block.
    error = (drawn.mean(0) - grad).abs()
    assert (error <= 5 * grad.abs() / 16 / math.sqrt(keys) + 2**-13).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_stays_finite_and_the_rest_what_it_is(dtype):
    largest = torch.finfo(dtype).max
    grad = torch.full((64,), largest, dtype=dtype)
    grad[::2] = -largest
    for key in range(50):
        assert unstash_of(grad, key).isfinite().all()
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0] * 16, dtype=dtype)
    assert torch.equal(
        unstash_of(odd, 3).nan_to_num(7.0, posinf=8.0, neginf=9.0)[:4].float(), torch.tensor([8.0, 9, 7, 0])
    )


# --- norm and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_exactly_that_of_the_full_gradients(dtype):
    model = deep(dtype, layers=4)
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    expected = gk.get_total_norm([p.grad for p in twin.parameters()])
    release = gk.GradientRelease(torch.optim.SGD(model.parameters(), lr=0.1))
    loss_of(model).backward()
    norm = release.step()
    assert same_bits(norm, expected.float())
    assert same_bits(release.grad_norm, norm)


@pytest.mark.parametrize("make", [gk.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_below_three_tenths(make, dtype):
    model = deep(dtype)
    full = 4 * sum(p.numel() for p in model.parameters())
    release = gk.GradientRelease(make(model.parameters(), lr=1e-3), max_norm=1.0)
    for seed in range(2):
        loss_of(model, seed).backward()
        assert all(p.grad is None for p in model.parameters())
        assert release.held_grad_bytes <= 0.26 * full
        release.step()
        assert all(p.grad is None for p in model.parameters())
        assert release.held_grad_bytes == 0
    assert 0.25 * full < release.peak_grad_bytes <= 0.3 * full


def test_peak_counts_the_gradient_that_arrives():
    param = nn.Parameter(torch.randn(6400))
    release = gk.GradientRelease(torch.optim.SGD([param], lr=0.1))
    param.square().sum().backward()
    assert release.held_grad_bytes == 6400 + state_blocks(6400)
    assert release.peak_grad_bytes == release.held_grad_bytes + 4 * 6400


def test_every_parameter_step_and_seed_rounds_anew():
    updates = []
    for seed in (0, 0, 5):
        params = [nn.Parameter(torch.zeros(640)) for _ in range(2)]
        release = gk.GradientRelease(torch.optim.SGD(params, lr=1.0), seed=seed)
        weights = torch.randn(640, generator=torch.Generator().manual_seed(2))
        for _ in range(2):
            before = [p.detach().clone() for p in params]
            sum((p * weights).sum() for p in params).backward()
            release.step()
            updates.extend(b - p.detach() for p, b in zip(params, before, strict=True))
    assert all(map(same_bits, updates[:4], updates[4:8]))  # by nothing but these
    drawn = [*updates[:4], *updates[8:]]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_what_is_held_is_all_that_lives():
    model = deep()
    shown = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: shown.append(sum(p.grad is not None for p in params)))
    params = list(model.parameters())
    release = gk.GradientRelease(torch.optim.SGD(params, lr=0.1))

    def living():
        # Fake tensors that an earlier test left behind have no data to ask about.
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]

    gc.collect()
    old = living()  # held, so that none of them goes meanwhile
    known = {t.untyped_storage().data_ptr() for t in old}
    loss_of(model).backward()
    gc.collect()
    assert shown == [1] * len(params)  # the others are gone, or have not come
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living()}
    held = sum(nbytes for address, nbytes in new.items() if address not in known)
    # Beside the blocks, only the sums of squares and the tables of addresses live.
    beside = sum(8 * chunk_count(p.numel()) + 8 * 6 for p in params)
    assert release.held_grad_bytes <= held <= release.held_grad_bytes + beside


# --- training -------------------------------------------------------------------------------------------------------


def test_clips_by_the_exact_norm():
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    before = [p.detach().clone() for p in model.parameters()]
    release = gk.GradientRelease(torch.optim.SGD(model.parameters(), lr=1.0), max_norm=0.5)
    (model(torch.randn(4, 64)).square().sum() * 100).backward()
    norm = release.step()
    moved = torch.cat([(p - b).detach().flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert norm > 100
    assert abs(float(moved.norm()) - 0.5) < 0.02  # rounded to 8 bits after it was measured


@pytest.mark.parametrize("make", [gk.AdamW, torch.optim.AdamW, gk.SGD])
def test_trains_as_the_full_gradients_do(make):
    def train(released):
        torch.manual_seed(3)
        block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Embedding(16, 32), block, nn.Linear(32, 16))
        opt = make(model.parameters(), lr=3e-3 if make is not gk.SGD else 0.3)
        release = gk.GradientRelease(opt, max_norm=1.0) if released else None
        generator = torch.Generator().manual_seed(4)
        losses = []
        for _ in range(100):
            x = torch.randint(0, 16, (16, 12), generator=generator)
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), (5 * x + 3).remainder(16).flatten())
            loss.backward()
            if release is None:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
            else:
                release.step()
            losses.append(loss.item())
        return losses[0], sum(losses[-10:]) / 10

    start, full = train(released=False)
    _, stashed = train(released=True)
    assert full < start / 10
    assert abs(stashed - full) < 0.02 * start


def test_optimizer_state_counts_every_step_once():
    model = deep(layers=3)
    opt = gk.AdamW(model.parameters())
    release = gk.GradientRelease(opt)
    for seed in range(3):
        loss_of(model, seed).backward()
        release.step()
    assert {float(opt.state[p]["step"]) for p in model.parameters()} == {3.0}


def test_resumed_run_rounds_alike():
    def run(steps, model=None, saved=None):
        model = deep(layers=2) if model is None else model
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        release = gk.GradientRelease(opt, seed=5)
        if saved is not None:
            release.load_state_dict(saved)
        for seed in steps:
            loss_of(model, seed).backward()
            release.step()
        release.detach()
        return model, release.state_dict()

    whole, _ = run(range(4))
    half, saved = run(range(2))
    half, _ = run(range(2, 4), half, saved)
    assert all(map(same_bits, whole.parameters(), half.parameters()))


# --- corners --------------------------------------------------------------------------------------------------------


def test_frozen_unused_and_tied_parameters():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "frozen": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model["frozen"].requires_grad_(False)
    twin = copy.deepcopy(model)

    def loss(m):
        x = torch.ones(2, 8)
        return m["a"](m["frozen"](m["a"](x))).square().sum()

    loss(twin).backward()
    expected = gk.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
    kept = [p.detach().clone() for name in ("frozen", "unused") for p in model[name].parameters()]
    used = model["a"].weight.detach().clone()
    release = gk.GradientRelease(gk.AdamW(model.parameters()))
    loss(model).backward()
    assert same_bits(release.step(), expected.float())
    assert all(map(torch.equal, kept, [p for name in ("frozen", "unused") for p in model[name].parameters()]))
    assert not torch.equal(used, model["a"].weight)


def test_non_finite_gradients():
    for skip in (False, True):
        model = nn.Linear(4, 4)
        before = model.weight.detach().clone()
        release = gk.GradientRelease(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=1.0, skip_nonfinite=skip)
        (model(torch.ones(1, 4)).sum() * math.inf).backward()
        assert not math.isfinite(release.step())
        assert torch.equal(model.weight, before) == skip
        assert release.held_grad_bytes == 0


def test_second_backward_is_refused_and_the_first_kept():
    model = deep(layers=2)
    twin = copy.deepcopy(model)
    for m, twice in ((model, True), (twin, False)):
        release = gk.GradientRelease(torch.optim.SGD(m.parameters(), lr=0.1))
        loss_of(m).backward()
        if twice:
            with pytest.raises(RuntimeError, match="expected one backward a step"):
                loss_of(m, 1).backward()
            assert all(p.grad is None for p in m.parameters())
        release.step()
    assert all(map(same_bits, model.parameters(), twin.parameters()))


def test_zero_grad_forgets():
    model = deep(layers=2)
    before = [p.detach().clone() for p in model.parameters()]
    release = gk.GradientRelease(torch.optim.SGD(model.parameters(), lr=0.1))
    loss_of(model).backward()
    release.zero_grad()
    assert release.step() == 0
    assert all(map(torch.equal, before, model.parameters()))
    loss_of(model).backward()
    assert release.step() > 0


def test_forgotten_step_and_left_gradients_are_named():
    model = deep(layers=2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    release = gk.GradientRelease(opt)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="call step\\(\\) of the GradientRelease"):
        opt.step()
    late = nn.Parameter(torch.ones(3))
    late.grad = torch.ones(3)
    opt.add_param_group({"params": [late]})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="was not released"):
        release.step()
    assert all(map(torch.equal, before, model.parameters()))
    late.grad = None
    release.step()
    assert torch.equal(late, torch.ones(3))


def test_sparse_gradient_is_refused():
    model = nn.Embedding(10, 4, sparse=True)
    release = gk.GradientRelease(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="sparse_coo, expected plain dense"):
        model(torch.tensor([1, 2])).sum().backward()
    assert release.held_grad_bytes == 0


def test_detach_context_and_garbage_give_gradients_back():
    model = deep(layers=2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with gk.GradientRelease(opt):
        loss_of(model).backward()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    opt.step()
    opt.zero_grad()
    gk.GradientRelease(opt)  # nobody refers to it
    gc.collect()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def _sgd(*params):
    return torch.optim.SGD(list(params), lr=0.1)


def _with_grad():
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    return _sgd(param)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: _sgd(nn.Parameter(torch.ones(2))), {"max_norm": -1.0}, "max_norm must be at least 0"),
        (lambda: _sgd(nn.Parameter(torch.ones(2))), {"seed": -1}, "seed must be"),
        (lambda: _sgd(nn.Parameter(torch.ones(2), requires_grad=False)), {}, "without a parameter that requires grad"),
        (lambda: _sgd(nn.Parameter(torch.ones(2, dtype=torch.float64))), {}, "dtype torch.float64"),
        (lambda: _sgd(nn.Parameter(torch.ones(2, dtype=torch.complex64))), {}, "dtype torch.complex64"),
        (_with_grad, {}, "has a gradient already"),
        (lambda: gk.AdamW([nn.Parameter(torch.ones(2))], max_norm=1.0), {}, "clips or skips by itself"),
        (lambda: gk.AdamW([nn.Parameter(torch.ones(2))], skip_nonfinite=True), {}, "clips or skips by itself"),
    ],
)
def test_what_it_refuses_leaves_no_hook(make, options, message):
    opt = make()
    with pytest.raises(ValueError, match=message):
        gk.GradientRelease(opt, **options)
    for param in opt.param_groups[0]["params"]:
        assert not param._post_accumulate_grad_hooks


def test_one_owner():
    model = deep(layers=2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    first = gk.GradientRelease(opt)
    with pytest.raises(ValueError, match="already released by another object"):
        gk.GradientRelease(opt)
    first.detach()
    gk.GradientRelease(opt).detach()


def test_processes_that_would_average_are_refused():
    model = deep(layers=2)
    release = gk.GradientRelease(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="expected one process"):
            loss_of(model).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert release.held_grad_bytes == 0


def test_an_optimizer_that_refuses_costs_no_gradient():
    model = deep(layers=2)
    opt = gk.AdamW(model.parameters())
    release = gk.GradientRelease(opt)
    loss_of(model).backward()
    held = release.held_grad_bytes
    opt.param_groups[0]["betas"] = (0.9, "not a number")
    with pytest.raises((TypeError, ValueError)):
        release.step()
    assert release.held_grad_bytes == held
    assert all(p.grad is None for p in model.parameters())
    opt.param_groups[0]["betas"] = (0.9, 0.999)
    assert release.step() > 0
    assert release.held_grad_bytes == 0


@pytest.mark.parametrize("options", [{"master": "split8", "state": "int8"}, {"stochastic_rounding": True}])
def test_works_with_low_precision_state(options):
    model = deep(torch.bfloat16, layers=3)
    release = gk.GradientRelease(gk.AdamW(model.parameters(), lr=1e-2, **options), max_norm=1.0)
    losses = []
    for _ in range(20):
        losses.append(loss_of(model))
        losses[-1].backward()
        release.step()
    assert losses[-1] < losses[0] / 2
