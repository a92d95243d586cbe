"""Random bits that nothing can change: not threads, backends, ranks, a resumed run or how parameters are grouped."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from two_processes import in_two_processes

import gradkern as gk
from gradkern.ops._step.codecs import StateCodec, decode_state
from gradkern.testing import same_bits
from tests.optim.models import OPTIMIZERS

RANDOM = {
    "parameter": {"stochastic_rounding": True},
    "bf16 state": {"state": "bf16"},
    "int8 state": {"state": "int8"},
    "all": {"stochastic_rounding": True, "state": "int8", "seed": 2**40 + 3},
}
# Large enough to be shared out between threads, with a tail; and one that is smaller than anything.
SIZES = (70_001, 3, 200_000)


def start(sizes=SIZES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(n).bfloat16()) for n in sizes]


def set_grads(params, step):
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).bfloat16()


def run(params, opt, steps):
    for step in steps:
        set_grads(params, step)
        opt.step()
    return bits_of(params, opt)


def bits_of(params, opt):
    return [*(p.detach() for p in params), *(t for p in params for _, t in sorted(opt.state[p].items()))]


def all_same_bits(ours, theirs):
    return len(ours) == len(theirs) and all(map(same_bits, ours, theirs))


# --- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threads_and_backends_draw_the_same(name, options):
    results = []
    before = torch.get_num_threads()
    try:
        for backend, threads in (("native", 1), ("native", 2), ("reference", 1)):
            torch.set_num_threads(threads)
            params = start()
            with gk.use_backend(backend):
                results.append(run(params, OPTIMIZERS[name](params, **options), range(2)))
    finally:
        torch.set_num_threads(before)
    assert all_same_bits(results[0], results[1])
    assert all_same_bits(results[0], results[2])


@pytest.mark.parametrize("options", RANDOM.values(), ids=RANDOM)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_goes_on_drawing(name, options):
    sizes = (5000, 3)
    params = start(sizes)
    expected = run(params, OPTIMIZERS[name](params, **options), range(5))

    params = start(sizes)
    opt = OPTIMIZERS[name](params, **options)
    run(params, opt, range(2))
    file = io.BytesIO()
    torch.save([params, opt.state_dict()], file)
    file.seek(0)
    resumed, state_dict = torch.load(file, weights_only=False)
    other = OPTIMIZERS[name](resumed, **options)
    other.load_state_dict(state_dict)
    assert all_same_bits(run(resumed, other, range(2, 5)), expected)

    copied, pickled = copy.deepcopy((params, opt))
    assert all_same_bits(run(copied, pickled, range(2, 5)), expected)


def averaged_over_ranks(rank):
    params = start((5000, 3))
    opt = gk.AdamW(params, lr=1e-2, max_norm=1.0, **RANDOM["all"])
    for step in range(3):
        for p, g in zip(params, rank_grads(params, step, rank), strict=True):
            torch.distributed.all_reduce(g)
            p.grad_dtype = None
            p.grad = g / 2
        opt.step()
    return bits_of(params, opt)


def rank_grads(params, step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [torch.randn(p.shape, generator=generator) for p in params]


def test_two_ranks_draw_what_one_process_draws(tmp_path):
    params = start((5000, 3))
    opt = gk.AdamW(params, lr=1e-2, max_norm=1.0, **RANDOM["all"])
    for step in range(3):
        both = (rank_grads(params, step, rank) for rank in range(2))
        for p, g, h in zip(params, *both, strict=True):
            p.grad_dtype = None
            p.grad = (g + h) / 2
        opt.step()
    for bits in in_two_processes(averaged_over_ranks, tmp_path):
        assert all_same_bits(bits, bits_of(params, opt))


def test_numbers_of_parameters_count_not_groups_nor_neighbours():
    def build(arrange, dropped=()):
        params = start((900, 70, 4100, 5))
        opt = arrange(params)
        for step in range(3):
            set_grads(params, step)
            for i in dropped:
                params[i].grad = None
            opt.step()
        return [
            [p.detach(), *(t for _, t in sorted(opt.state[p].items()))] if p.grad is not None else [] for p in params
        ]

    def one(params):
        return gk.AdamW(params, lr=1e-2, **RANDOM["all"])

    def three(params):
        return gk.AdamW(
            [{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}], lr=1e-2, **RANDOM["all"]
        )

    def late(params):
        opt = gk.AdamW(params[:2], lr=1e-2, **RANDOM["all"])
        opt.add_param_group({"params": params[2:]})
        return opt

    def reordered(params):
        return gk.AdamW(params[::-1], lr=1e-2, **RANDOM["all"])

    expected = build(one)
    for arrange in (three, late):
        assert all(map(all_same_bits, build(arrange), expected))
    # Without a gradient a parameter draws nothing, and the others what they drew beside it.
    for got, bits in zip(build(one, dropped=(0, 2)), expected, strict=True):
        assert not got or all_same_bits(got, bits)
    assert not any(map(all_same_bits, build(reordered), expected))


def test_seed_step_parameter_and_place_all_count():
    """Equal numbers at every place of two equal parameters: whatever differs afterwards was drawn."""

    def draw(seed, step):
        params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
        opt = gk.SGD(params, lr=1.0, stochastic_rounding=True, seed=seed)
        for _ in range(step):
            for p in params:
                p.detach().fill_(1.0)
                p.grad = torch.full_like(p, -(2.0**-8))  # half way between 1 and the next bf16
            opt.step()
        return [(p.detach() > 1).float() for p in params]

    draws = [one for seed in (0, 1, 2**32, 2**53 - 1) for step in (1, 2) for one in draw(seed, step)]
    table = torch.stack(draws) - 0.5
    # Of 4,096 fair coins the mean deviates by 1/128, and so does the product of any two: five times that, at most.
    assert table.mean(1).abs().max() < 5 / 128
    correlation = table @ table.T / 4096 * 4
    assert (correlation - torch.eye(len(draws))).abs().max() < 5 / 64
    # Neighbours at any small distance, and the halves of a vector or a block.
    for distance in (1, 2, 4, 8, 16, 32, 64, 128, 1024):
        assert (table[:, distance:] * table[:, :-distance]).mean(1).abs().max() * 4 < 5 / math.sqrt(4096 - distance)


# --- the right mean -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1 / 256, 0.1, 0.5, 0.9, 255 / 256])
def test_a_parameter_is_rounded_up_as_often_as_it_lies_above(fraction):
    numel = 1 << 16
    fraction = round(fraction * 2**16) / 2**16
    for value in (1.0, -1.0, 2.0**-100):
        p = nn.Parameter(torch.full((numel,), value, dtype=torch.bfloat16))
        p.grad_dtype = None
        p.grad = torch.full((numel,), -value * fraction * 2.0**-7)
        gk.SGD([p], lr=1.0, stochastic_rounding=True).step()
        above = (p.detach().double() / value - 1.0) * 2.0**7
        assert set(above.unique().tolist()) == {0.0, 1.0}
        deviation = math.sqrt(fraction * (1 - fraction) / numel)
        assert above.mean().item() == pytest.approx(fraction, abs=5 * deviation)


def test_what_a_parameter_can_hold_is_not_rounded():
    p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.25)
    gk.SGD([p], lr=1.0, stochastic_rounding=True).step()
    assert set(p.tolist()) == {0.75}


def test_updates_far_below_the_last_bit_add_up_on_average():
    numel, steps, update = 4096, 1000, 1e-5
    p = nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
    opt = gk.SGD([p], lr=update, stochastic_rounding=True)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        opt.step()
    spacing = 2.0**-8
    share = update / spacing
    deviation = spacing * math.sqrt(steps * share * (1 - share) / numel)
    assert p.detach().double().mean().item() == pytest.approx(1 - steps * update, abs=5 * deviation)


def decoded(state, name, signed):
    if state[name].dtype == torch.bfloat16:
        return state[name].double()
    return decode_state(StateCodec.BLOCK8, state[name], state[f"{name}_scale"], signed=signed).double()


@pytest.mark.parametrize("state", ["bf16", "int8"])
def test_the_mean_of_kept_state_is_the_state(state):
    """Gradients within a factor of 8, so that nothing falls below what a block of 8-bit codes can hold."""
    numel = 1 << 16
    torch.manual_seed(0)
    gradient = torch.empty(numel).uniform_(0.125, 1.0) * torch.randint(0, 2, (numel,)).mul(2).sub(1)
    p, q = (nn.Parameter(torch.zeros(numel)) for _ in range(2))
    opt, exact = gk.AdamW([p], state=state), gk.AdamW([q])
    p.grad, q.grad = gradient, gradient
    opt.step()
    exact.step()
    mantissa = {"bf16": (7, 7), "int8": (3, 4)}[state]
    for (name, signed), bits in zip((("exp_avg", True), ("exp_avg_sq", False)), mantissa, strict=True):
        truth = exact.state[q][name].double()
        spacing = 2.0 ** (torch.frexp(truth).exponent.double() - 1 - bits)
        errors = (decoded(opt.state[p], name, signed) - truth) / spacing
        assert errors.abs().max() < 1.0
        assert errors.std() > 0.3  # rounding to nearest has 0.29, this 0.41
        # A variance of at most 1/4 at any element; both signs, and every position in a block.
        for part in (errors, errors[gradient > 0], errors[gradient < 0]):
            assert abs(part.mean().item()) < 5 * 0.5 / math.sqrt(len(part))
        places = errors.view(-1, 64).mean(0)
        assert places.abs().max() < 5 * 0.5 / math.sqrt(numel / 64)


@pytest.mark.parametrize("gradient", [0.3, 0.7, 0.95])
def test_equal_moments_of_many_parameters_have_the_right_mean_too(gradient):
    """8-bit codes draw from the number itself: equal numbers are rounded alike under one key, not under many."""
    count = 2048
    params = [nn.Parameter(torch.zeros(1)) for _ in range(count + 1)]
    exact = gk.AdamW([params.pop()])
    opts = [gk.AdamW(params, state="int8", seed=0), gk.AdamW(params, state="int8", seed=1)]
    codes = []
    for opt in (*opts, exact):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.full((1,), gradient)
        opt.step()
    truth = next(iter(exact.state.values()))
    for name, signed, bits in (("exp_avg", True, 3), ("exp_avg_sq", False, 4)):
        value = truth[name].double()
        spacing = 2.0 ** (torch.frexp(value).exponent.double() - 1 - bits)
        for opt in opts:
            errors = torch.cat([decoded(opt.state[p], name, signed) - value for p in params]) / spacing
            assert len(errors.unique()) == 2
            assert abs(errors.mean().item()) < 5 * 0.5 / math.sqrt(count)
            codes.append(errors > 0)
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[2], codes[3])


@pytest.mark.parametrize("beta2", [0.9, 0.999])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_8_bit_moments_grow_past_every_power_of_two(sign, beta2):
    """Equal gradients: the largest of a block rises by less than a code a step, and must still leave its binade."""
    numel, steps = 1 << 12, 1000
    p, q = (nn.Parameter(torch.zeros(numel)) for _ in range(2))
    opt, exact = (gk.AdamW([x], lr=1e-3, betas=(0.9, beta2), **o) for x, o in ((p, {"state": "int8"}), (q, {})))
    scales = 2.0 ** torch.linspace(0.0, 1.0, numel // 64).repeat_interleave(64)  # a block reaches any place in a binade
    for _ in range(steps):
        p.grad = q.grad = sign * scales
        opt.step()
        exact.step()
    for name, signed, bits in (("exp_avg", True, 3), ("exp_avg_sq", False, 4)):
        truth = exact.state[q][name].double()
        assert (decoded(opt.state[p], name, signed) / truth - 1.0).abs().max() < 1.5
        assert (decoded(opt.state[p], name, signed) / truth).mean().item() == pytest.approx(1.0, abs=2.0**-bits)
    assert p.mean().item() == pytest.approx(q.mean().item(), rel=0.02)


def test_8_bit_moments_follow_fp32_ones_over_many_steps():
    """Rounding at every step is a random walk that the moments' decay keeps short: it does not drift."""
    numel, steps = 1 << 14, 300
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.zeros(numel)) for _ in range(2))
    opt, exact = (gk.AdamW([x], lr=1e-3, betas=(0.9, 0.99), **o) for x, o in ((p, {"state": "int8"}), (q, {})))
    for _ in range(steps):
        p.grad = q.grad = torch.randn(numel) + 0.5
        opt.step()
        exact.step()
    for name, signed, decay, bits in (("exp_avg", True, 0.9, 3), ("exp_avg_sq", False, 0.99, 4)):
        truth = exact.state[q][name].double()
        error = decoded(opt.state[p], name, signed) - truth
        # Steps of rounding have at most half a spacing (2**-bits of a value at most twice the block's) each, and the
        # sum of what is left of them 1 / (1 - decay**2) of its variance. Its mean has a numel-th of that.
        spacing = 2.0**-bits * truth.abs().max().item()
        walk = 0.5 * spacing / math.sqrt(1 - decay**2)
        assert error.std().item() < walk
        assert abs(error.mean().item()) < 5 * walk / math.sqrt(numel)
    # Where every gradient pushes the same way, both arrive at the same place.
    assert p.mean().item() == pytest.approx(q.mean().item(), rel=0.01)
