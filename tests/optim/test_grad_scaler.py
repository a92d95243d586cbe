"""gk.GradScaler is torch.amp.GradScaler without its pass; torch's own works unmodified."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from host_reads import NoHostReads
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits
from tests.optim.models import OPTIMIZERS, loss_of, mlp

CLIPS = {
    "none": lambda: None,
    "global": lambda: gk.clip.GlobalNorm(0.05),
    "group": lambda: gk.clip.GroupNorm(0.05),
    "order 1": lambda: gk.clip.GlobalNorm(0.5, 1.0),
    "order inf": lambda: gk.clip.GlobalNorm(0.01, float("inf")),
    "order 3": lambda: gk.clip.GlobalNorm(0.05, 3.0),
    "value": lambda: gk.clip.Value(1e-3),
    "agc": lambda: gk.clip.AGC(0.01),
    "zclip": lambda: gk.clip.ZClip(warmup_steps=2),
    "autoclip": lambda: gk.clip.AutoClip(),
    "spike": lambda: gk.clip.SkipOnSpike(),
}
OURS_AND_TORCHS = (gk.GradScaler, torch.amp.GradScaler)
CHECK = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_


def poison(model, value=float("inf"), which=-1):
    """As if one gradient had overflowed."""
    with torch.no_grad():
        list(model.parameters())[which].grad.view(-1)[-1] = value


def train(model, opt, scaler, steps=6, overflow=(1, 4), micro_batches=2, before=None):
    """Returns the scale after every step."""
    scales = []
    for step in range(steps):
        for k in range(micro_batches):
            scaler.scale(loss_of(model, 10 * step + k) / micro_batches).backward()
        if step in overflow:
            poison(model)
        if before is not None:
            before(step)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def state_tensors(opt):
    states = (opt.state[p] for group in opt.param_groups for p in group["params"] if p in opt.state)
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def all_same_bits(ours, theirs):
    return all(map(same_bits, list(ours), list(theirs)))


# --- the same as torch's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
def test_every_policy_steps_as_under_torchs_scaler(clip):
    runs = []
    for kind in OURS_AND_TORCHS:
        model = mlp()
        opt = OPTIMIZERS["AdamW"](model.parameters(), clip=CLIPS[clip]())
        scales = train(model, opt, kind("cpu", init_scale=2.0**10, growth_interval=2))
        runs.append((scales, list(model.parameters()), state_tensors(opt)))
    (scales, params, states), (other_scales, other_params, other_states) = runs
    assert scales == other_scales == [1024.0, 512.0, 512.0, 1024.0, 512.0, 512.0]
    assert all_same_bits(params, other_params)
    assert all_same_bits(states, other_states)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(clip):
    scaled, plain = mlp(), mlp()
    opt = OPTIMIZERS["SGD"](scaled.parameters(), clip=CLIPS[clip]())
    reference = OPTIMIZERS["SGD"](plain.parameters(), clip=CLIPS[clip]())
    scaler = gk.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        for model in (scaled, plain):  # scaled by hand: backward must not round, or flush, the scaled ones otherwise
            (loss_of(model, step) * (1000.0 if step == 2 else 1.0)).backward()
        for p in scaled.parameters():
            p.grad = p.grad * 2.0**10
        scaler.scale(torch.zeros(()))
        scaler.step(opt)
        scaler.update()
        reference.step()
        assert all_same_bits(scaled.parameters(), plain.parameters())
        assert opt.grad_norm is None or reference.grad_norm is None or same_bits(opt.grad_norm, reference.grad_norm)
        norms, others = opt.grad_norms, reference.grad_norms
        assert len(norms) >= len(others)
        assert all_same_bits((norms[p] for p in scaled.parameters() if others), others.values())
        opt.zero_grad()
        reference.zero_grad()


@pytest.mark.parametrize("name", ["Adam", "SGD", "Lion"])
def test_every_optimizer_steps_as_under_torchs_scaler(name):
    runs = []
    for kind in OURS_AND_TORCHS:
        model = mlp()
        opt = OPTIMIZERS[name](model.parameters(), max_norm=0.05)
        scales = train(model, opt, kind("cpu", init_scale=2.0**10, growth_interval=2))
        runs.append((scales, [*model.parameters(), *state_tensors(opt)]))
    assert runs[0][0] == runs[1][0]
    assert all_same_bits(runs[0][1], runs[1][1])


def test_scale_clip_and_step_together_are_torchs_three_passes():
    """What a trainer has to refuse with a fused optimizer of torch: it would clip gradients that carry the scale."""
    ours, theirs = mlp(), mlp()
    scaler = gk.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    opt = gk.AdamW(ours.parameters(), lr=1e-2, max_norm=0.05)
    scales = train(ours, opt, scaler)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    torchs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    def clip(step):
        torchs.unscale_(reference)
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)

    assert train(theirs, reference, torchs, before=clip) == scales
    # Four steps of AdamW, as in test_adamw: a few ulps of updates of size lr.
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
    assert {float(s["step"]) for s in opt.state.values()} == {4.0}
    assert opt.skipped_steps.item() == 2


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_optimizers_of_torch_are_treated_as_by_torchs_scaler(options):
    runs = []
    for kind in OURS_AND_TORCHS:
        model = mlp()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        scaler = kind("cpu", init_scale=2.0**10, growth_interval=2)
        runs.append((train(model, opt, scaler), scaler.state_dict(), [*model.parameters(), *state_tensors(opt)]))
    assert runs[0][:2] == runs[1][:2]
    assert all_same_bits(runs[0][2], runs[1][2])


def test_unscale_shows_gradients_and_is_not_done_again():
    model, truth = mlp(), mlp()
    opt = gk.AdamW(model.parameters(), lr=1e-2, max_norm=0.05)
    scaler = gk.GradScaler("cpu", init_scale=2.0**10)
    for k in range(3):  # the large gradient is folded, with a norm that unscaling makes stale
        scaler.scale(loss_of(model, k)).backward()
        loss_of(truth, k).backward()
    scaler.unscale_(opt)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(model.parameters(), truth.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(opt)
    with torch.no_grad():
        model[0].weight.grad.mul_(2.0)
        truth[0].weight.grad.mul_(2.0)
    scaler.step(opt)
    scaler.update()
    expected = gk.AdamW(truth.parameters(), lr=1e-2, max_norm=0.05)
    expected.step()
    assert same_bits(opt.grad_norm, expected.grad_norm)
    assert all_same_bits(model.parameters(), truth.parameters())


@pytest.mark.parametrize("kind", OURS_AND_TORCHS)
def test_state_travels_between_ours_and_torchs(kind):
    other = next(k for k in OURS_AND_TORCHS if k is not kind)
    model = mlp()
    opt = gk.AdamW(model.parameters())
    scaler = kind("cpu", init_scale=2.0**10, growth_interval=3)
    train(model, opt, scaler, steps=3, overflow=(0,))
    resumed = other("cpu")
    resumed.load_state_dict(scaler.state_dict())
    unpickled = pickle.loads(pickle.dumps(scaler))
    assert resumed.state_dict() == unpickled.state_dict() == scaler.state_dict()
    twins = [copy.deepcopy((model, opt)) for _ in range(2)]
    expected = train(model, opt, scaler, steps=2, overflow=())
    assert train(*twins[0], resumed, steps=2, overflow=()) == expected == [1024.0, 1024.0]
    assert train(*twins[1], unpickled, steps=2, overflow=()) == expected


def test_order_of_calls_is_checked_as_in_torch():
    for kind in OURS_AND_TORCHS:
        model = mlp()
        opt = gk.AdamW(model.parameters())
        scaler = kind("cpu")
        with pytest.raises(AssertionError, match="_scale is None"):
            scaler.step(opt)
        scaler.scale(loss_of(model, 0)).backward()
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(opt, closure=lambda: None)
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.update()
        assert all_same_bits(before, model.parameters())
        scaler.step(opt)
        with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
            scaler.step(opt)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
            scaler.unscale_(opt)
        scaler.update(2.0)
        assert scaler.get_scale() == 2.0
        opt.zero_grad()
        scaler.step(opt)  # no gradients: nothing was looked at
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            scaler.update()
        assert not hasattr(opt, "grad_scale")
        assert not hasattr(opt, "found_inf")
        assert not hasattr(opt, "found_inf_per_device")


def test_disabled_it_passes_everything_through():
    model, plain = mlp(), mlp()
    opt, expected = gk.AdamW(model.parameters()), gk.AdamW(plain.parameters())
    scaler = gk.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(opt)
    scaler.update()
    loss_of(plain, 0).backward()
    expected.step()
    assert all_same_bits(model.parameters(), plain.parameters())
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}


# --- what torch's cannot do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [name for name in CLIPS if name != "order 3"])
def test_nothing_is_read_on_the_host_and_no_pass_is_made(clip):
    model = mlp()
    with gk.use_backend("native"):
        opt = gk.AdamW(model.parameters(), lr=torch.tensor(1e-2), state="int8", clip=CLIPS[clip]())
        scaler = gk.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            scaler.scale(loss_of(model, step)).backward()
            if step == 1:
                poison(model)
            grads = [p.grad.clone() for p in model.parameters()]
            with NoHostReads(CHECK):
                scaler.step(opt)
                scaler.update()
            assert all_same_bits(grads, (p.grad for p in model.parameters())), "gradients were rewritten"
            opt.zero_grad()
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_a_gradient_that_is_not_finite_skips_and_backs_off(dtype, value):
    params = [nn.Parameter(torch.ones(300).to(dtype)), nn.Parameter(torch.ones(5).to(dtype))]
    opt = gk.AdamW(params, lr=1e-2)
    scaler = gk.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        before = copy.deepcopy([*params, *state_tensors(opt)])
        for p in params:
            p.grad = torch.ones_like(p)
        if step == 1:
            params[1].grad[3] = value
        scaler.step(opt)
        found = scaler._found_inf_per_device(opt)
        assert {device: v.item() for device, v in found.items()} == {torch.device("cpu"): float(step == 1)}
        scaler.update()
        assert all_same_bits(before, [*params, *state_tensors(opt)]) == (step == 1)
    assert scaler.get_scale() == 4.0
    assert {float(opt.state[p]["step"]) for p in params} == {2.0}


@pytest.mark.parametrize("master", [None, "fp32"])
@pytest.mark.parametrize("kind", OURS_AND_TORCHS)
def test_fp16_gradients_are_unscaled_in_fp32(kind, master):
    """Gradients that fp16 could not hold without their scale: its smallest number is 2**-24."""
    torch.manual_seed(0)
    values = torch.randn(5000).half()
    param = nn.Parameter(torch.zeros(5000, dtype=torch.float16))
    opt = gk.SGD([param], lr=2.0**20, master=master, max_norm=1.0)
    scaler = kind("cpu", init_scale=2.0**20)
    scaler.scale(torch.zeros(()))
    param.grad = values.clone()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(opt)
    scaler.update(2.0**20)
    scaler.step(opt)
    scaler.update()
    norm = values.double().norm() / 2.0**20
    assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert same_bits(param.detach(), -values)


def test_each_optimizer_has_its_own_verdict():
    for kind in OURS_AND_TORCHS:
        models = [mlp(seed) for seed in range(3)]
        opts = [
            gk.AdamW(models[0].parameters()),
            gk.SGD(models[1].parameters(), max_norm=1.0),
            torch.optim.SGD(models[2].parameters()),
        ]
        before = [[p.clone() for p in model.parameters()] for model in models]
        scaler = kind("cpu", init_scale=4.0, growth_interval=1)
        for model in models:
            scaler.scale(loss_of(model, 0)).backward()
        poison(models[1])
        for opt in opts:
            scaler.step(opt)
        verdicts = [[v.item() for v in scaler._found_inf_per_device(opt).values()] for opt in opts]
        assert verdicts == [[0.0], [1.0], [0.0]]
        scaler.update()
        assert scaler.get_scale() == 2.0
        stayed = [all_same_bits(model.parameters(), old) for model, old in zip(models, before, strict=True)]
        assert stayed == [False, True, False]


@pytest.mark.parametrize("kind", OURS_AND_TORCHS)
@pytest.mark.parametrize(
    "clip", [None, gk.clip.GlobalNorm(1.0), gk.clip.GroupNorm(1.0), gk.clip.SkipOnSpike(), gk.clip.ZClip()], ids=repr
)
def test_a_step_skipped_for_the_scaler_counts_once(kind, clip):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = gk.AdamW([{"params": [p]}, {"params": [q]}], clip=copy.deepcopy(clip))
    scaler = kind("cpu", init_scale=4.0)
    for factor in (math.inf, 1.0, math.nan):
        opt.zero_grad()
        scaler.scale((p.sum() + q.sum()) * factor).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.skipped_steps.item() == 2
    assert [float(opt.state[x]["step"]) for x in (p, q)] == [1.0, 1.0]


def test_a_spike_is_no_overflow():
    p = nn.Parameter(torch.zeros(4))
    opt = gk.SGD([p], lr=1.0, clip=gk.clip.SkipOnSpike(factor=2.0, warmup_steps=1))
    scaler = gk.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for size in (1.0, 100.0):
        p.grad = torch.full((4,), size * 8.0)
        scaler.step(opt)
        scaler.update()
    assert p.tolist() == [-1.0] * 4
    assert opt.skipped_steps.item() == 1
    assert scaler.get_scale() == 8.0


def test_a_norm_that_has_to_be_finite_raises_before_anything_changes_and_the_scale_can_still_back_off():
    model = mlp()
    opt = gk.AdamW(model.parameters(), clip=gk.clip.GlobalNorm(1.0, error_if_nonfinite=True))
    scaler = gk.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0)).backward()
    poison(model)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="non-finite"):
        scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all_same_bits(before, model.parameters())
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf_per_device")


def test_orders_in_which_finite_gradients_overflow_or_infinite_ones_hide_are_looked_at_by_torch():
    for order, grads, found in [
        (100.0, [1e30, 1e30], 0.0),
        (0.0, [float("inf"), 1.0], 1.0),
        (float("-inf"), [float("inf"), 1.0], 1.0),
    ]:
        p = nn.Parameter(torch.zeros(2))
        opt = gk.SGD([p], lr=1.0, clip=gk.clip.GlobalNorm(1.0, order))
        scaler = gk.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.zeros(()))
        p.grad = torch.tensor(grads)
        scaler.step(opt)
        assert [v.item() for v in scaler._found_inf_per_device(opt).values()] == [found]


def test_gradients_of_other_types_are_looked_at_by_torch():
    class Wrapped(torch.Tensor):
        pass

    p = nn.Parameter(torch.zeros(4))
    opt = gk.SGD([p], lr=1.0)
    scaler = gk.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for grad in (torch.full((4,), 8.0), torch.full((4,), float("inf"))):
        p.grad = grad.as_subclass(Wrapped)
        scaler.step(opt)
        scaler.update()
    assert p.tolist() == [-1.0] * 4
    assert scaler.get_scale() == 4.0


# --- beside the other parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_with_an_accumulator(dtype):
    """fp32 sums of scaled micro-batches: the norm comes from the folds, the step is the one on unscaled sums."""
    results = []
    for kind in (*OURS_AND_TORCHS, None):
        model = mlp().to(dtype)
        accumulator = gk.GradAccumulator(model.parameters())
        master = None if dtype == torch.float32 else "fp32"
        opt = gk.AdamW(model.parameters(), lr=1e-2, max_norm=0.05, master=master)
        scaler = kind("cpu", init_scale=16.0, growth_interval=2) if kind else torch.amp.GradScaler(enabled=False)
        for step in range(4):
            for k in range(3):
                x = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + k)).to(dtype)
                scaler.scale(model(x).float().square().mean() / 3).backward()
            assert {g.dtype for g in accumulator.grads} == {torch.float32}
            if step == 1 and kind:
                poison(model)
            if step == 1 and not kind:
                accumulator.zero_grad()
                continue
            scaler.step(opt)
            scaler.update()
            accumulator.zero_grad()
        results.append([*model.parameters(), opt.grad_norm])
        if kind:
            assert scaler.get_scale() == 16.0
            assert opt.skipped_steps.item() == 1
    assert all_same_bits(results[0], results[1])
    if dtype != torch.float16:  # where the scale decides what is rounded to zero: that is what it is for
        assert all_same_bits(results[0], results[2])


@pytest.mark.parametrize("kind", OURS_AND_TORCHS)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_joint_norm_is_that_of_all_unscaled_gradients(kind, unscale):
    models, truths = [mlp(seed) for seed in range(3)], [mlp(seed) for seed in range(3)]
    clip = gk.clip.GlobalNorm(0.05)
    opts = [
        gk.AdamW(models[0].parameters(), lr=1e-2, clip=clip),
        gk.SGD(models[1].parameters(), lr=1e-2, clip=clip),
        torch.optim.AdamW(models[2].parameters(), lr=1e-2),
    ]
    clip.attach(opts[2])
    references = [
        torch.optim.AdamW(truths[0].parameters(), lr=1e-2),
        torch.optim.SGD(truths[1].parameters(), lr=1e-2),
        torch.optim.AdamW(truths[2].parameters(), lr=1e-2),
    ]
    scaler = kind("cpu", init_scale=2.0**10)
    for step in range(2):
        for k in range(2):  # folded: the norms of the first two models' large gradients are there already
            for model, truth in zip(models, truths, strict=True):
                scaler.scale(loss_of(model, 10 * step + k)).backward()
                loss_of(truth, 10 * step + k).backward()
        if unscale:
            for opt in opts:
                scaler.unscale_(opt)
        for opt in opts:
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
        norm = nn.utils.clip_grad_norm_([p for truth in truths for p in truth.parameters()], 0.05)
        for opt in references:
            opt.step()
            opt.zero_grad()
        assert [o.grad_norm.item() for o in opts[:2]] == [pytest.approx(norm.item(), rel=1e-5)] * 2
    for model, truth in zip(models, truths, strict=True):
        for p, q in zip(model.parameters(), truth.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)


def test_with_a_token_normalizer():
    results = []
    for kind in OURS_AND_TORCHS:
        model = mlp()
        opt = gk.AdamW(model.parameters(), max_norm=0.05)
        normalizer = gk.TokenNormalizer(opt)
        scaler = kind("cpu", init_scale=2.0**10)
        for tokens in (3, 5):
            scaler.scale(normalizer.loss(loss_of(model, tokens), tokens, reduction="mean")).backward()
        scaler.step(opt)
        scaler.update()
        assert not hasattr(opt, "grad_scale")
        results.append([*model.parameters(), opt.grad_norm])
    assert all_same_bits(*results)


def test_hooks_and_schedulers_see_one_step():
    model = mlp()
    opt = gk.AdamW(model.parameters(), max_norm=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)  # wraps opt.step
    events = []
    opt.register_step_event_hook(lambda event: events.append(bool(event.skipped)))
    scaler = gk.GradScaler("cpu", init_scale=2.0**10)
    train(model, opt, scaler, steps=2, overflow=(1,))
    scheduler.step()
    assert events == [False, True]
