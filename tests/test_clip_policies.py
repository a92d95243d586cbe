"""Every clip policy in every optimizer, against its paper written out in fp64; no policy reads anything on the host."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from host_reads import NoHostReads
from torch import nn

import gradkern as gk
from gradkern import functional
from gradkern.clip import AGC, AutoClip, GlobalNorm, GroupNorm, SkipOnSpike, Value, ZClip
from gradkern.ops.step_scalars.reference import SKIP
from gradkern.testing import same_bits
from tests.optim.models import OPTIMIZERS

SHAPES = ((30, 50), (7,), (), (5000,), (3, 4097))
POLICIES = {
    "GlobalNorm": lambda: GlobalNorm(0.5),
    "GlobalNorm 1": lambda: GlobalNorm(0.5, 1.0),
    "GlobalNorm inf": lambda: GlobalNorm(0.01, math.inf),
    "GlobalNorm 3": lambda: GlobalNorm(0.5, 3.0),
    "GroupNorm": lambda: GroupNorm(0.5),
    "Value": lambda: Value(0.01),
    "AGC": lambda: AGC(0.01),
    "ZClip": lambda: ZClip(warmup_steps=2),
    "AutoClip": lambda: AutoClip(50.0),
    "SkipOnSpike": lambda: SkipOnSpike(warmup_steps=2),
}


def params_of(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def give_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def norm_of(grads, order=2.0):
    flat = torch.cat([g.double().flatten() for g in grads])
    return float(torch.linalg.vector_norm(flat, order))


class Reference:
    """What a policy makes of gradients, in fp64; ``skipped`` where the step must not happen."""

    skipped = False

    def __call__(self, params, grads):
        raise NotImplementedError


class ReferenceNorm(Reference):
    def __init__(self, max_norm, order=2.0):
        self.max_norm, self.order = max_norm, order

    def __call__(self, params, grads):
        return [g.double() * min(1.0, self.max_norm / (norm_of(grads, self.order) + 1e-6)) for g in grads]


class ReferenceValue(Reference):
    def __call__(self, params, grads):
        return [g.double().clamp(-0.01, 0.01) for g in grads]


class ReferenceAGC(Reference):
    """Brock et al. 2021, equation 3, unit by unit."""

    def __call__(self, params, grads):
        out = []
        for p, g in zip(params, grads, strict=True):
            rows = (p, g) if p.dim() < 2 else None
            pairs = [rows] if rows else list(zip(p, g, strict=True))
            units = []
            for w, u in pairs:
                w, u = w.detach().double(), u.double()
                limit = 0.01 * max(float(w.norm()), 1e-3)
                units.append(u if float(u.norm()) < limit else u * (limit / max(float(u.norm()), 1e-6)))
            out.append(units[0] if p.dim() < 2 else torch.stack(units))
        return out


class ReferenceZClip(Reference):
    """Kumar et al. 2025, algorithm 1: reciprocal clipping, mean and variance by exponential averages."""

    def __init__(self):
        self.seen, self.mean, self.variance = [], None, None

    def __call__(self, params, grads):
        norm = norm_of(grads)
        if len(self.seen) < 2:
            self.seen.append(norm)
            if len(self.seen) == 2:
                self.mean = sum(self.seen) / 2
                self.variance = sum((x - self.mean) ** 2 for x in self.seen) / 2
            return [g.double() for g in grads]
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / deviation
        clipped = self.mean + deviation * 2.5**2 / z if z > 2.5 else norm
        self.mean = 0.97 * self.mean + 0.03 * clipped
        self.variance = 0.97 * self.variance + 0.03 * (clipped - self.mean) ** 2
        return [g.double() * (clipped / norm) for g in grads]


class ReferenceAutoClip(Reference):
    """Seetharaman et al. 2020, algorithm 1: the percentile includes the norm at hand."""

    def __init__(self):
        self.norms = []

    def __call__(self, params, grads):
        self.norms.append(norm_of(grads))
        limit = float(torch.tensor(self.norms, dtype=torch.float64).quantile(0.5))
        return [g.double() * min(1.0, limit / (self.norms[-1] + 1e-6)) for g in grads]


class ReferenceSpike(Reference):
    def __init__(self):
        self.count, self.mean = 0, 0.0

    def __call__(self, params, grads):
        norm = norm_of(grads)
        self.skipped = self.count >= 2 and norm > 10.0 * self.mean
        if not self.skipped:
            weight = 0.03 if self.count >= 2 else 1.0 / (self.count + 1)
            self.mean += weight * (norm - self.mean)
            self.count += 1
        return [g.double() for g in grads]


REFERENCES = {
    "GlobalNorm": lambda: ReferenceNorm(0.5),
    "GlobalNorm 1": lambda: ReferenceNorm(0.5, 1.0),
    "GlobalNorm inf": lambda: ReferenceNorm(0.01, math.inf),
    "GlobalNorm 3": lambda: ReferenceNorm(0.5, 3.0),
    "GroupNorm": lambda: ReferenceNorm(0.5),
    "Value": ReferenceValue,
    "AGC": ReferenceAGC,
    "ZClip": ReferenceZClip,
    "AutoClip": ReferenceAutoClip,
    "SkipOnSpike": ReferenceSpike,
}
SCALES = (1.0, 1.1, 0.9, 30.0, 1.0)  # the fourth is a spike


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_that_of_the_gradients_which_the_paper_makes(optimizer, policy):
    ours, theirs = params_of(), params_of()
    opt = OPTIMIZERS[optimizer](ours, clip=POLICIES[policy]())
    plain = OPTIMIZERS[optimizer](theirs)
    reference = REFERENCES[policy]()
    skipped = 0
    for seed, scale in enumerate(SCALES):
        give_grads(ours, seed, scale)
        give_grads(theirs, seed, scale)
        made = reference(theirs, [p.grad for p in theirs])
        opt.step()
        skipped += reference.skipped
        if not reference.skipped:
            for p, g in zip(theirs, made, strict=True):
                p.grad = g.float()
            plain.step()
    for p, q in zip(ours, theirs, strict=True):
        # Lion moves by signs: where a momentum is nothing but rounding, a sign may be either.
        same = torch.isclose(p, q, rtol=1e-5, atol=1e-6)
        assert same.double().mean() > (0.999 if optimizer == "Lion" else 0.999999)
    assert int(opt.skipped_steps) == skipped
    assert skipped == (policy == "SkipOnSpike")


@pytest.mark.parametrize("policy", POLICIES)
def test_bf16_parameters_with_fp32_gradients_from_the_accumulator(policy):
    ours, theirs = params_of(torch.bfloat16), params_of()
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p)
    accumulator = gk.GradAccumulator(ours)
    opt = gk.SGD(ours, lr=1.0, clip=POLICIES[policy](), master="fp32")
    accumulator.accumulate_([torch.full_like(p, 0.125) for p in ours])
    accumulator.accumulate_([torch.full_like(p, 0.25) for p in ours])
    assert all(p.grad.dtype == torch.float32 for p in ours)
    made = REFERENCES[policy]()(theirs, [torch.full(p.shape, 0.375) for p in ours])
    opt.step()
    for p, q, g in zip(ours, theirs, made, strict=True):
        assert torch.equal(p, (q.double() - g).to(torch.bfloat16)) or torch.allclose(
            p.double(), q.double() - g, rtol=2**-8
        )
    accumulator.detach()


def test_groups_are_clipped_apart_and_may_have_their_own_threshold():
    params = params_of()
    give_grads(params, 0)
    groups = [{"params": params[:2]}, {"params": params[2:], "max_norm": 0.25}]
    before = [p.detach().clone() for p in params]
    opt = gk.SGD(groups, lr=1.0, clip=GroupNorm(0.5))
    opt.step()
    for part, limit in ((slice(0, 2), 0.5), (slice(2, None), 0.25)):
        moved = [b - p.detach() for b, p in zip(before[part], params[part], strict=True)]
        assert norm_of(moved) == pytest.approx(limit, rel=1e-4)
    assert float(opt.grad_norm) == pytest.approx(norm_of([p.grad for p in params]), rel=1e-6)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_of_groups_clipped_apart_is_that_of_all(order):
    params = params_of()
    give_grads(params, 0)
    opt = gk.SGD([{"params": params[:2]}, {"params": params[2:]}], clip=GroupNorm(0.5, norm_type=order))
    opt.step()
    assert float(opt.grad_norm) == pytest.approx(norm_of([p.grad for p in params], order), rel=1e-6)


@pytest.mark.parametrize("policy", [GlobalNorm, GroupNorm])
def test_the_norm_of_order_zero_counts_tensors_whatever_their_scale(policy):
    params = params_of()
    give_grads(params, 0)
    params[1].grad.zero_()
    opt = gk.SGD([{"params": params[:2]}, {"params": params[2:]}], clip=policy(10.0, norm_type=0.0))
    opt.grad_scale = torch.tensor(1024.0)
    opt.step()
    assert float(opt.grad_norm) == 4.0
    assert float(opt.grad_norm) == float(torch.nn.utils.get_total_norm([p.grad for p in params], 0.0))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_a_policy_of_ones_own_may_skip_whatever_it_measures(order):
    class Skips(gk.clip.ClipPolicy):
        norm_type = order
        skips = True

        def decide_(self, scalars, scale):
            scalars[SKIP].fill_(1.0)

    params = params_of()
    give_grads(params, 0)
    before = [p.detach().clone() for p in params]
    opt = gk.SGD(params, clip=Skips())
    opt.step()
    assert all(map(same_bits, before, params))
    assert opt.skipped_steps.item() == 1


def test_a_joint_norm_that_is_not_finite_names_the_partners_parameters():
    clip = GlobalNorm(1.0, error_if_nonfinite=True)
    (p, *_), (q, *_) = params_of(), params_of()
    first, second = gk.SGD([p], clip=clip), gk.AdamW([("weight", q)], clip=clip)
    p.grad, q.grad = torch.ones_like(p), torch.full_like(q, math.inf)
    with pytest.raises(RuntimeError, match=r"not finite: AdamW's weight \(30, 50\)\."):
        first.step()
    with pytest.raises(RuntimeError, match=r"not finite: weight \(30, 50\)\."):
        second.step()


def test_norms_of_parameters_are_those_of_the_last_step_or_none():
    params = params_of()
    give_grads(params, 0)
    opt = gk.SGD(params, max_norm=1.0)
    opt.step()
    opt.state_dict()
    assert len(opt.grad_norms) == len(params)
    opt.max_norm = None
    opt.step()
    assert opt.grad_norms == {}
    opt.max_norm = 1.0
    params[0].grad = None
    opt.step()
    assert list(map(id, opt.grad_norms)) == list(map(id, params[1:]))
    opt.clip = GlobalNorm(1.0, norm_type=1.0)
    opt.step()
    assert opt.grad_norms == {}


def test_norms_of_parameters_are_there_for_every_member_of_a_joint_norm():
    clip, models = GlobalNorm(1.0), (params_of(), params_of())
    opts = [gk.SGD(params, clip=clip) for params in models]
    for params in models:
        give_grads(params, 0)
    for opt, params in zip(opts, models, strict=True):
        opt.step()
        assert {id(p): float(n) for p, n in opt.grad_norms.items()} == {
            id(p): pytest.approx(norm_of([p.grad]), rel=1e-6) for p in params
        }
    models[1][0].grad = None
    for params in models:
        params[-1].grad *= 2
    for opt in opts:
        opt.step()
    assert len(opts[0].grad_norms) == len(models[0])
    assert list(map(id, opts[1].grad_norms)) == list(map(id, models[1][1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_every_parameter_are_those_of_fp64(dtype):
    params = params_of(dtype)
    give_grads(params, 1)
    opt = gk.AdamW(params, max_norm=1.0)
    assert opt.grad_norms == {}
    opt.step()
    norms = opt.grad_norms
    assert list(map(id, norms)) == list(map(id, params))
    for p in params:
        assert norms[p].shape == ()
        assert float(norms[p]) == pytest.approx(norm_of([p.grad]), rel=1e-6)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_names_the_parameters_before_anything_moves(order, bad):
    named = [(f"layer.{i}", p) for i, p in enumerate(params_of())]
    params = [p for _, p in named]
    give_grads(params, 2)
    params[1].grad[3] = bad
    params[4].grad[2, 5] = bad
    opt = gk.AdamW(named, clip=GlobalNorm(1.0, order, error_if_nonfinite=True))
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="non-finite") as caught:
        opt.step()
    assert "layer.1 (7,)" in str(caught.value)
    assert "layer.4 (3, 4097)" in str(caught.value)
    assert "layer.0" not in str(caught.value)
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))
    assert all(float(s["step"]) == 0 for s in opt.state.values())
    give_grads(params, 2)
    opt.step()
    assert all(float(s["step"]) == 1 for s in opt.state.values())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("policy", ["ZClip", "AutoClip", "SkipOnSpike"])
@pytest.mark.parametrize("after", [1, 5])
def test_a_norm_that_is_not_finite_teaches_nothing(policy, bad, after):
    params = params_of()
    opt = gk.SGD(params, lr=0.0, clip=POLICIES[policy]())
    for seed in range(after):
        give_grads(params, seed, SCALES[seed % len(SCALES)])
        opt.step()
    before = copy.deepcopy(opt.clip.state_dict())
    params[1].grad[0] = bad
    opt.step()
    learnt = opt.clip.state_dict()
    assert learnt.keys() == before.keys()
    assert all(same_bits(learnt[name], before[name]) for name in before)


@pytest.mark.parametrize("policy", ["ZClip", "AutoClip", "SkipOnSpike"])
def test_a_resumed_run_has_the_bits_of_one_that_went_on(policy, tmp_path):
    def steps(params, opt, seeds):
        for seed in seeds:
            give_grads(params, seed, SCALES[seed % len(SCALES)])
            opt.step()

    whole = params_of()
    opt = gk.AdamW(whole, clip=POLICIES[policy]())
    steps(whole, opt, range(9))
    first = params_of()
    opt = gk.AdamW(first, clip=POLICIES[policy]())
    steps(first, opt, range(4))
    torch.save(opt.state_dict(), tmp_path / "saved.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = gk.AdamW(second, clip=POLICIES[policy]())
    resumed.load_state_dict(torch.load(tmp_path / "saved.pt"))
    steps(second, resumed, range(4, 9))
    assert all(same_bits(p, q) for p, q in zip(whole, second, strict=True))
    copied = copy.deepcopy(opt)
    assert copied.clip.state_dict().keys() == opt.clip.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: gk.AdamW(p, max_norm=1.0, clip=Value(1.0)), "max_norm=1.0 and clip=Value.*expected one of them"),
        (lambda p: gk.AdamW(p, max_norm=-1.0), "max_norm must be at least 0"),
        (lambda p: gk.SGD(p, lr=0.1, clip=GlobalNorm(math.nan)), "max_norm must be at least 0"),
        (lambda p: gk.Lion(p, clip=Value(-1.0)), "clip_value must be at least 0"),
        (lambda p: gk.Lion(p, clip=AGC(-1.0)), "clipping and eps must be at least 0"),
        (lambda p: gk.Lion(p, clip=ZClip(alpha=1.0)), "expected 0 <= alpha < 1"),
        (lambda p: gk.Lion(p, clip=AutoClip(101)), "0 <= percentile <= 100"),
        (lambda p: gk.Lion(p, clip=SkipOnSpike(0.5)), "expected factor > 1"),
    ],
)
def test_a_policy_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make(params_of())


def test_clip_must_be_a_policy():
    with pytest.raises(TypeError, match=r"clip is a float, expected a policy of gradkern.clip"):
        gk.AdamW(params_of(), clip=1.0)


# --- nothing is read on the host ------------------------------------------------------------------------------------


def test_the_watch_sees_host_reads():
    for read in (lambda t: t.item(), bool, float, lambda t: t.nonzero(), torch.unique, lambda t: t.equal(t)):
        with pytest.raises(AssertionError, match="reads on the host"), NoHostReads():
            read(torch.ones(()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_reads_on_the_host(optimizer, policy):
    params = params_of()
    opt = OPTIMIZERS[optimizer](params, clip=POLICIES[policy](), skip_nonfinite=True)
    for seed in range(3):
        give_grads(params, seed)
        if seed == 2:
            params[0].grad[0, 0] = math.nan
        with NoHostReads():
            opt.step()
            taken = opt.skipped_steps
    assert isinstance(taken, torch.Tensor)
    assert int(taken) == 1


def test_one_group_that_is_not_finite_skips_the_step_of_all():
    params = params_of()
    opt = gk.AdamW([{"params": params[:2]}, {"params": params[2:]}], clip=GroupNorm(0.5), skip_nonfinite=True)
    give_grads(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]
    for bad in (0, 4):
        give_grads(params, 1)
        params[bad].grad.view(-1)[0] = math.inf
        opt.step()
    assert int(opt.skipped_steps) == 2
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))
    assert all(float(opt.state[p]["step"]) == 1.0 for p in params)


def test_agc_takes_a_unit_of_zeros_to_have_length_eps():
    for eps in (1e-3, 0.5):
        param = nn.Parameter(torch.zeros(3, 4))
        param.grad = torch.full((3, 4), 2.0)  # rows of length 4
        gk.SGD([param], lr=1.0, clip=AGC(0.01, eps=eps)).step()
        assert torch.allclose(param.detach().norm(dim=1), torch.tensor(0.01 * eps))


def test_a_skipped_step_changes_nothing_and_is_counted():
    params = params_of()
    opt = gk.AdamW(params, max_norm=1.0, skip_nonfinite=True)
    give_grads(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]
    states = copy.deepcopy(opt.state_dict()["state"])
    params[2].grad.fill_(math.inf)
    opt.step()
    opt.step()
    assert int(opt.skipped_steps) == 2
    assert all(same_bits(p, b) for p, b in zip(params, before, strict=True))
    for i, state in opt.state_dict()["state"].items():
        assert all(same_bits(value, states[i][name]) for name, value in state.items())


# --- sums over units ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_sums_over_units_are_those_of_the_units_alone(dtype, backend):
    torch.manual_seed(3)
    tensors = [torch.randn(shape).to(dtype) for shape in ((5, 7), (3, 4096), (2, 9000), (1,), (12_289,))]
    sizes = [7, 4096, 9000, 1, 12_289]
    with gk.use_backend(backend):
        got = functional.sumsq_units(tensors, sizes)
        expected = []
        for tensor, size in zip(tensors, sizes, strict=True):
            for unit in tensor.view(-1, size):
                total = torch.zeros((), dtype=torch.float64)
                for k, partial in enumerate(functional.sumsq([unit])):
                    total = partial if k == 0 else total + partial
                expected.append(total)
    assert same_bits(got, torch.stack(expected))
    truth = torch.cat([t.double().square().view(-1, s).sum(1) for t, s in zip(tensors, sizes, strict=True)])
    assert torch.allclose(got, truth, rtol=1e-14)
    assert functional.sumsq_units([], []).shape == (0,)
