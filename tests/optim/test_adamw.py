"""gk.AdamW is torch.optim.AdamW: same losses, same state, same errors; plus clipping."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits
from tests.optim.models import loss_of, mlp

# Both round every operation to fp32, in another order: an update of size lr differs by a few ulps relative to lr.
LR = 1e-2


def train(opt, model, steps, *, micro_batches=2, start=0, clip=None):
    losses = []
    for step in range(start, start + steps):
        for k in range(micro_batches):
            loss = loss_of(model, 10 * step + k) / micro_batches
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0},
        {"amsgrad": True},
        {"maximize": True, "lr": 1e-4},
        {"betas": (0.0, 0.5), "eps": 1e-4},
        {"lr": torch.tensor(1e-3)},
        {"foreach": True},
        {"fused": True},
    ],
    ids=str,
)
def test_losses_are_those_of_torch(options):
    options = {"lr": LR, **options}
    ours, theirs = mlp(), mlp()
    got = train(gk.AdamW(ours.parameters(), **options), ours, 12)
    expected = train(torch.optim.AdamW(theirs.parameters(), **options), theirs, 12)
    # Twelve steps, each adding at most 4 ulps of the update to parameters of size 0.04: 12 * 4 * 6e-8 * lr / 0.04.
    assert got == pytest.approx(expected, rel=2e-4)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=LR * 1e-3)


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e9])
def test_clip_inside_the_step_is_clip_before_the_step(max_norm):
    ours, theirs = mlp(), mlp()
    got = train(gk.AdamW(ours.parameters(), lr=LR, max_norm=max_norm), ours, 8, micro_batches=3)
    expected = train(torch.optim.AdamW(theirs.parameters(), lr=LR), theirs, 8, micro_batches=3, clip=max_norm)
    assert got == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backends_train_to_the_same_bits(backend):
    model, other = mlp(), mlp()
    train(gk.AdamW(model.parameters(), lr=LR, max_norm=0.5), model, 3)
    with gk.use_backend(backend):
        train(gk.AdamW(other.parameters(), lr=LR, max_norm=0.5), other, 3)
    assert all(map(same_bits, model.parameters(), other.parameters()))


def test_grad_norm_is_the_norm_before_clipping():
    model = mlp()
    opt = gk.AdamW(model.parameters(), max_norm=1e-3)
    assert opt.grad_norm is None
    for k in range(3):
        loss_of(model, k).backward()
    truth = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    grads = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert opt.grad_norm.dtype == torch.float32
    assert opt.grad_norm.shape == ()
    assert opt.grad_norm.item() == pytest.approx(truth.item(), rel=1e-7)
    assert all(same_bits(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True)), "gradients rewritten"


def test_infinite_max_norm_measures_without_clipping():
    model, other = mlp(), mlp()
    opt = gk.AdamW(model.parameters(), max_norm=float("inf"))
    train(opt, model, 2)
    train(gk.AdamW(other.parameters()), other, 2)
    assert opt.grad_norm.item() > 0
    assert all(map(same_bits, model.parameters(), other.parameters()))


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_dict_travels_both_ways_and_training_goes_on(direction, amsgrad):
    kinds = [gk.AdamW, torch.optim.AdamW]
    first, second = kinds if direction == "ours to torch" else kinds[::-1]
    model = mlp()
    opt = first(model.parameters(), lr=LR, amsgrad=amsgrad)
    train(opt, model, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    expected = train(opt, model, 4, start=4)

    file.seek(0)
    saved = torch.load(file)
    resumed = mlp(seed=1)
    resumed.load_state_dict(saved["model"])
    other = second(resumed.parameters(), lr=1.0)
    other.load_state_dict(saved["opt"])
    assert other.param_groups[0]["lr"] == LR
    assert {type(s["step"]) for s in other.state.values()} == {torch.Tensor}
    assert train(other, resumed, 4, start=4) == pytest.approx(expected, rel=2e-4)
    assert all(float(s["step"]) == 8.0 for s in other.state.values())


def test_resume_is_bit_equal():
    model = mlp()
    opt = gk.AdamW(model.parameters(), lr=LR, max_norm=0.5)
    train(opt, model, 3)
    twin = copy.deepcopy(model)
    resumed = gk.AdamW(twin.parameters(), lr=LR, max_norm=0.5)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, model, 3, start=3)
    train(resumed, twin, 3, start=3)
    assert all(map(same_bits, model.parameters(), twin.parameters()))


def test_pickle_and_deepcopy_keep_working():
    model = mlp()
    opt = gk.AdamW(model.parameters(), lr=LR, max_norm=0.5)
    train(opt, model, 2)
    model_copy, opt_copy = pickle.loads(pickle.dumps((model, opt)))
    assert opt_copy.max_norm == 0.5
    train(opt_copy, model_copy, 2, start=2)
    train(opt, model, 2, start=2)
    assert all(map(same_bits, model.parameters(), model_copy.parameters()))


def test_unequal_steps_late_groups_frozen_and_unused_parameters():
    def build(kind):
        torch.manual_seed(0)
        a, b, late = (nn.Parameter(torch.randn(50)) for _ in range(3))
        frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        unused = nn.Parameter(torch.randn(4))
        opt = kind([{"params": [a, frozen, unused]}, {"params": [b], "lr": 1e-1}], lr=LR)
        for step in range(6):
            if step == 2:
                opt.add_param_group({"params": [late], "weight_decay": 0.3})
            ((a.square().sum() if step % 2 else 0.0) + (b * late).sum()).backward()
            opt.step()
            opt.zero_grad()
        return [a, b, late, frozen, unused], opt

    ours, opt = build(gk.AdamW)
    theirs, reference = build(torch.optim.AdamW)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    steps = [float(s["step"]) for s in opt.state.values()]
    assert sorted(steps) == sorted(float(s["step"]) for s in reference.state.values())
    assert len(opt.state) == len(reference.state) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bfloat16])
def test_other_dtypes_follow_torch(dtype):
    def build(kind, **extra):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(40).to(dtype)), nn.Parameter(torch.randn(7))]
        opt = kind(params, lr=LR, **extra)
        for step in range(5):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape).to(p.dtype)
            if not extra:
                nn.utils.clip_grad_norm_(params, 0.5)
            opt.step()
        return params

    ours = build(gk.AdamW, max_norm=0.5)
    theirs = build(torch.optim.AdamW)
    # bf16: our update runs in fp32 and rounds once where torch rounds at every operation.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance)


def test_noncontiguous_parameters_are_updated_in_place():
    def build(kind):
        torch.manual_seed(0)
        base = torch.randn(6, 8)
        strided = base[:, ::2].requires_grad_()
        channels_last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        opt = kind([strided, channels_last], lr=LR)
        for _ in range(3):
            (strided.square().sum() + channels_last.square().sum()).backward()
            opt.step()
            opt.zero_grad()
        return base, channels_last

    for p, q in zip(build(gk.AdamW), build(torch.optim.AdamW), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_closure_hooks_and_scheduler():
    model = mlp()
    opt = gk.AdamW(model.parameters(), lr=LR)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 1)
        loss.backward()
        calls.append("closure")
        return loss

    opt.param_groups[0]["lr"] = scheduler.base_lrs[0] = 1e-4
    first = opt.step(closure)
    scheduler.step()
    second = opt.step(closure)
    assert calls == ["pre", "closure", "post"] * 2
    assert second < first
    assert opt.param_groups[0]["lr"] == 5e-5


@pytest.mark.parametrize("unscale_first", [False, True])
def test_stock_grad_scaler_scales_clips_and_skips(unscale_first):
    model, truth = mlp(), mlp()
    opt = gk.AdamW(model.parameters(), lr=LR, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(3):  # several micro-batches: the large gradients are folded
        scaler.scale(loss_of(model, k)).backward()
        loss_of(truth, k).backward()
    if unscale_first:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    expected = gk.AdamW(truth.parameters(), lr=LR, max_norm=0.5)
    expected.step()
    assert opt.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-6)
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)

    events = []
    opt.register_step_event_hook(events.append)
    before = [p.clone() for p in model.parameters()]
    opt.zero_grad()
    scaler.scale(loss_of(model, 1) * float("inf")).backward()
    scaler.step(opt)
    assert all(map(same_bits, model.parameters(), before))
    assert {float(s["step"]) for s in opt.state.values()} == {1.0}
    assert bool(events[0].skipped)


def test_a_first_step_that_is_skipped_is_told():
    events, param = [], nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), float("inf"))
    opt = gk.AdamW([param], skip_nonfinite=True)
    opt.register_step_event_hook(events.append)
    opt.step()
    assert bool(events[0].skipped)
    assert torch.equal(param, torch.ones(3))


def test_nonfinite_gradients_do_what_torch_does():
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    for p in (ours, theirs):
        p.grad = torch.tensor([1.0, float("inf"), 1.0])
    gk.AdamW([ours], max_norm=1.0).step()
    nn.utils.clip_grad_norm_([theirs], 1.0)
    torch.optim.AdamW([theirs]).step()
    assert torch.allclose(ours, theirs, equal_nan=True)
    assert ours.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"eps": -1e-8}, "Invalid epsilon value"),
        ({"weight_decay": -1}, "Invalid weight_decay value"),
        ({"max_norm": -1.0}, "max_norm must be at least 0 .* got -1.0"),
        ({"max_norm": float("nan")}, "got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        gk.AdamW([nn.Parameter(torch.ones(2))], **options)


def test_empty_parameter_list_is_torchs_error():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        gk.AdamW([])


def test_step_without_gradients_changes_nothing():
    p = nn.Parameter(torch.ones(3))
    opt = gk.AdamW([p], max_norm=1.0)
    opt.step()
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert not opt.state


def test_sparse_gradients_are_torchs_error():
    embedding = nn.Embedding(10, 3, sparse=True)
    opt = gk.AdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()
    assert same_bits(embedding.weight, before)


def test_mixed_devices_are_refused_before_anything_moves():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))
    opt = gk.AdamW([a, b], max_norm=1.0)
    a.grad, b.grad = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        opt.step()
    assert a.tolist() == [1.0, 1.0, 1.0]


def test_step_event_says_what_the_step_did():
    model = mlp()
    opt = gk.AdamW(model.parameters(), lr=LR, weight_decay=0.1, max_norm=0.1)
    events = []

    def observe(event):
        for s in event.params:
            events.append((s, s.preconditioner()))  # noqa: PERF401  copied while valid

    handle = opt.register_step_event_hook(observe)
    before = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(3):
        loss_of(model, step).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        events.clear()
        opt.step()
        opt.zero_grad()
        assert len(events) == len(before)
        for i, (s, preconditioner) in enumerate(events):
            momenta[i] = s.momentum * momenta[i] + s.grad_weight * s.grad_multiplier * grads[i]
            before[i] = s.decay * before[i] - preconditioner * momenta[i]
            assert torch.allclose(before[i], s.param, rtol=1e-5, atol=1e-6)
    handle.remove()
    events.clear()
    loss_of(model, 9).backward()
    opt.step()
    assert not events


def test_replaced_state_tensors_are_used():
    model = mlp()
    opt = gk.AdamW(model.parameters(), lr=LR)
    train(opt, model, 1)
    for state in opt.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    twin = copy.deepcopy(model)
    fresh = gk.AdamW(twin.parameters(), lr=LR)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, model, 1, start=1)
    train(fresh, twin, 1, start=1)
    assert all(map(same_bits, model.parameters(), twin.parameters()))


def both(change, steps_after=2):
    """Train one step with each optimizer, change it behind its back, train on; return both sets of parameters."""
    results = []
    for kind in (gk.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(64))]
        opt = kind(params, lr=LR)
        for step in range(1 + steps_after):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            if step == 1:
                params = change(opt, params) or params
            opt.step()
        results.append((params, opt))
    return results


def clear_state(opt, params):
    opt.state.clear()


def set_step(opt, params):
    opt.state[params[1]]["step"] = torch.tensor(5.0)


def transpose_gradient(opt, params):
    params[0].grad = params[0].grad.t()


def transpose_in_place(opt, params):
    params[0].data = params[0].data.t()


def replace_parameter(opt, params):
    fresh = nn.Parameter(torch.ones(64))
    fresh.grad = params[1].grad
    opt.param_groups[0]["params"][1] = fresh
    return [params[0], fresh]


@pytest.mark.parametrize("change", [clear_state, set_step, transpose_gradient, transpose_in_place, replace_parameter])
def test_changes_behind_the_optimizers_back_do_what_they_do_in_torch(change):
    (ours, opt), (theirs, reference) = both(change)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert float(opt.state[p]["step"]) == float(reference.state[q]["step"])


def test_a_parameter_that_grew_is_refused_before_anything_is_written():
    p = nn.Parameter(torch.zeros(64))
    opt = gk.AdamW([p], lr=LR)
    p.grad = torch.ones(64)
    opt.step()
    p.data = torch.zeros(256)
    p.grad = torch.ones(256)
    with pytest.raises(RuntimeError):  # torch's own, from its own update: the state has another shape
        opt.step()
    assert p.data.shape == (256,)


def test_moments_of_unequal_dtype_are_left_to_torch():
    p = nn.Parameter(torch.zeros(64))
    opt = gk.AdamW([p], lr=LR)
    p.grad = torch.ones(64)
    opt.step()
    guard = opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"].double()
    opt.state[nn.Parameter(torch.zeros(1))] = {}  # another entry: the buckets are made anew
    opt.step()
    assert guard.dtype == torch.float64


def test_wrapped_gradients_are_refused_with_a_norm_that_others_share():
    class Wrapped(torch.Tensor):
        pass

    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4).as_subclass(Wrapped)
    with pytest.raises(ValueError, match="needs plain gradients, got a Wrapped"):
        gk.AdamW([p], max_norm=1.0).step()
    assert p.tolist() == [0.0] * 4
    opt = gk.AdamW([p])
    opt.step()
    assert opt.state[p]["step"].item() == 1.0
