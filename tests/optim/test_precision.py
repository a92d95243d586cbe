"""Parameter x gradient x state x master: what is kept in how many bits, and that nothing else depends on it."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import gradkern as gk
from bench.state8 import held_bytes
from gradkern.testing import same_bits
from tests.optim.models import OPTIMIZERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTERS = (None, "fp32", "split16", "split8")
STATES = (None, "fp32", "bf16", "int8")
# Sizes around the block of 64 and the chunk of 4,096 elements, none of them a multiple of a vector.
SHAPES = [(3, 23), (5000,), (1,)]


def supported(dtype, master):
    return not (dtype == torch.float16 and master in ("split16", "split8"))


def start(dtype):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def set_grads(params, step, dtype):
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        p.grad_dtype = None
        p.grad = noise.to(dtype)


def shadow(param, state):
    """The fp32 values that a parameter stands for."""
    master = state.get("master")
    if master is None:
        return param.detach().float()
    if master.dtype == torch.float32:
        return master
    high = param.detach().view(torch.int16).to(torch.int32) << 16
    return (high + (master.to(torch.int32) << (32 - 16 - 8 * master.itemsize))).view(torch.float32)


def rounded(x, dtype, master):
    """fp32 values as a parameter of that kind keeps them."""
    if master == "split8" and dtype == torch.bfloat16:
        bits = x.view(torch.int32).to(torch.int64)
        return (((bits + 0x7F + ((bits >> 8) & 1)) >> 8) << 8).to(torch.int32).view(torch.float32)
    return x if master is not None else x.to(dtype).float()


GRID = [case for case in itertools.product(DTYPES, DTYPES, MASTERS, STATES) if supported(DTYPES[case[0]], case[2])]


@pytest.mark.parametrize(("param", "grad", "master", "state"), GRID)
def test_a_step_is_the_fp32_step_with_what_is_kept_rounded(param, grad, master, state):
    """The twin has fp32 parameters that start every step from what the parameter under test stands for."""
    dtype = DTYPES[param]
    low_precision_state = dtype if state is None and master is None else None
    with gk.use_backend("native"):
        params, twins = start(dtype), [nn.Parameter(p.detach().float()) for p in start(dtype)]
        opt = gk.AdamW(params, lr=1e-2, weight_decay=0.1, master=master, state=state, max_norm=10.0)
        twin = gk.AdamW(twins, lr=1e-2, weight_decay=0.1, state=state, max_norm=10.0)
        others = start(dtype)
        other = gk.AdamW(others, lr=1e-2, weight_decay=0.1, master=master, state=state, max_norm=10.0)
        for step in range(3):
            set_grads(params, step, DTYPES[grad])
            set_grads(twins, step, DTYPES[grad])
            set_grads(others, step, DTYPES[grad])
            opt.step()
            twin.step()
            with gk.use_backend("reference"):
                other.step()
            for p, q, r in zip(params, twins, others, strict=True):
                assert p.dtype == dtype
                mine, its, same = opt.state[p], twin.state[q], other.state[r]
                assert same_bits(shadow(p, mine), rounded(q.detach(), dtype, master))
                # The parameter is the nearest to its master.
                half_ulp = 2.0 ** -(12 if dtype == torch.float16 else 9)  # relative to the power of two above
                above = 2.0 ** torch.frexp(shadow(p, mine)).exponent
                assert ((p.float() - shadow(p, mine)).abs() <= torch.clamp(half_ulp * above, min=2.0**-25)).all()
                for name in ("exp_avg", "exp_avg_sq"):
                    expected = its[name] if low_precision_state is None else its[name].to(low_precision_state)
                    assert same_bits(mine[name], expected)
                assert same_bits(p, r)
                assert mine.keys() == same.keys()
                assert all(same_bits(mine[name], same[name]) for name in mine)
                with torch.no_grad():
                    q.copy_(shadow(p, mine))
                    if low_precision_state is not None:
                        for name in ("exp_avg", "exp_avg_sq"):
                            its[name].copy_(mine[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_split16_is_an_fp32_master_over_a_thousand_steps(name):
    """Also of parameters that grow out of the fp16 range, cross zero or are subnormal."""
    runs = []
    for master in ("fp32", "split16"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(300).bfloat16()), nn.Parameter((torch.randn(70) * 1e-38).bfloat16())]
        runs.append((params, OPTIMIZERS[name](params, weight_decay=0.1, master=master, max_norm=1.0)))
    generator = torch.Generator().manual_seed(1)
    for step in range(1000):
        grads = [torch.randn(n, generator=generator).bfloat16() * scale for n, scale in ((300, 1.0), (70, 1e-3))]
        for params, opt in runs:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            opt.step()
        if step % 100 == 99:
            (ones, one), (others, other) = runs
            for p, q in zip(ones, others, strict=True):
                assert same_bits(p, q)
                assert same_bits(shadow(p, one.state[p]), shadow(q, other.state[q]))
                names = one.state[p].keys() - {"master"}
                assert all(same_bits(one.state[p][n], other.state[q][n]) for n in names)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_a_master_small_updates_add_up(name):
    """1,000 updates far below the resolution of bf16: without a master the parameter would never move."""
    ends = {}
    for master in MASTERS:
        p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        opt = OPTIMIZERS[name]([p], weight_decay=0.1, master=master)
        opt.param_groups[0]["weight_decay"] = 0.0
        opt.param_groups[0]["lr"] = 2e-5
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            opt.step()
        ends[master] = shadow(p, opt.state[p])[0].item()
    assert ends[None] == 1.0
    assert ends["fp32"] == ends["split16"] < 0.99
    # 8 of the 16 bits: half a unit of 2**-16 at each of 1,000 steps, at most.
    assert ends["split8"] == pytest.approx(ends["fp32"], abs=1000 * 2.0**-17)


# --- changes from outside -----------------------------------------------------------------------------------------


def by_copy(params, opt, value=3.0):
    with torch.no_grad():
        params[0].copy_(torch.full_like(params[0], value))


def by_load_state_dict(params, opt):
    holder = nn.Module()
    holder.p = params[0]
    holder.load_state_dict({"p": torch.full_like(params[0], 3.0)})


def by_data(params, opt):
    params[0].data.fill_(3.0)
    opt.resync()


def check_begun_at_three(param, opt, master, steps):
    """It must be as a parameter of 3.0 after these steps of an optimizer that has known no other value."""
    fresh = nn.Parameter(torch.full_like(param, 3.0))
    again = gk.SGD([fresh], lr=1e-3, master=master)
    for step in steps:
        set_grads([fresh], step, torch.bfloat16)
        again.step()
    assert same_bits(param, fresh)
    assert same_bits(opt.state[param]["master"], again.state[fresh]["master"])


@pytest.mark.parametrize("change", [by_copy, by_load_state_dict, by_data])
@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_a_parameter_changed_from_outside_renews_its_master_and_no_other(master, change):
    params, twins = start(torch.bfloat16), start(torch.bfloat16)
    opt, twin = gk.SGD(params, lr=1e-3, master=master), gk.SGD(twins, lr=1e-3, master=master)
    for step in range(4):
        if step == 2:
            change(params, opt)
        set_grads(params, step, torch.bfloat16)
        set_grads(twins, step, torch.bfloat16)
        opt.step()
        twin.step()
    check_begun_at_three(params[0], opt, master, (2, 3))
    if change is by_data and master != "fp32":
        return  # nobody can tell which: all are taken as they are
    for p, q in zip(params[1:], twins[1:], strict=True):
        assert same_bits(p, q)
        assert same_bits(opt.state[p]["master"], twin.state[q]["master"])


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_resync_takes_parameters_that_have_no_gradient_now(master):
    params = start(torch.bfloat16)
    opt = gk.SGD(params, lr=1e-3, master=master)
    set_grads(params, 0, torch.bfloat16)
    opt.step()
    params[0].grad = None
    opt.step()
    params[0].data.fill_(3.0)
    opt.resync()
    set_grads(params, 1, torch.bfloat16)
    opt.step()
    check_begun_at_three(params[0], opt, master, (1,))


@pytest.mark.parametrize("master", ["fp32", "split16"])
def test_a_change_is_seen_whenever_it_happens(master):
    """Also while the parameter has no gradient, and between the last step and a checkpoint."""
    params = start(torch.bfloat16)
    opt = gk.SGD(params, lr=1e-3, master=master)
    set_grads(params, 0, torch.bfloat16)
    opt.step()
    params[0].grad = None
    opt.step()
    by_copy(params, opt)
    opt.step()
    set_grads(params, 1, torch.bfloat16)
    opt.step()
    expected = 3.0 - 1e-3 * params[0].grad.float()
    # One fp32 rounding of the product, one of the difference.
    assert torch.allclose(shadow(params[0], opt.state[params[0]]), expected, rtol=2.0**-23, atol=0.0)

    for value, save in ((5.0, opt.state_dict), (3.0, lambda: copy.deepcopy(opt).state_dict())):
        opt.step()
        by_copy(params, opt, value)
        saved = save()
        resumed = [nn.Parameter(p.detach().clone()) for p in params]
        other = gk.SGD(resumed, lr=1e-3, master=master)
        other.load_state_dict(saved)
        set_grads(resumed, 1, torch.bfloat16)
        other.step()
        expected = value - 1e-3 * resumed[0].grad.float()
        assert torch.allclose(shadow(resumed[0], other.state[resumed[0]]), expected, rtol=2.0**-23, atol=0.0)


# --- layouts ------------------------------------------------------------------------------------------------------

PRECISE = [
    {"state": "int8"},
    {"state": "bf16"},
    {"master": "fp32"},
    {"master": "split16", "state": "int8"},
    {"stochastic_rounding": True},
]


@pytest.mark.parametrize("options", PRECISE, ids=str)
def test_a_gradient_of_another_layout_is_the_same_gradient(options):
    results = []
    for transposed in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(70, 90).bfloat16()), nn.Parameter(torch.randn(6, 5, 1, 1).bfloat16())]
        opt = gk.AdamW(params, lr=1e-2, max_norm=0.5, **options)
        for step in range(4):
            set_grads(params, step, torch.bfloat16)
            if transposed and step % 2:
                params[0].grad = params[0].grad.t().contiguous().t()
                params[1].grad = params[1].grad.as_strided((6, 5, 1, 1), (5, 1, 5, 5))
            opt.step()
        results.append([*params, opt.grad_norm, *(t for p in params for t in opt.state[p].values())])
    assert all(map(same_bits, *results))


def strided(dtype=torch.bfloat16):
    return torch.zeros(8, 16, dtype=dtype)[:, ::2].requires_grad_()


@pytest.mark.parametrize("options", PRECISE, ids=str)
def test_what_would_be_ignored_is_refused_before_anything_is_modified(options):
    beside = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    square = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    for param, extra in ((strided(), {}), (square, {"differentiable": True})):
        opt = gk.AdamW([beside, param], **options, **extra)
        beside.grad, param.grad = torch.ones_like(beside), torch.ones_like(param)
        with pytest.raises(ValueError, match=r"needs dense plain tensors and differentiable=False, got a \w+ of shape"):
            opt.step()
        assert beside.tolist() == [0.0] * 4
        assert not opt.state
    # Where the options mean nothing, nothing is refused.
    double = strided(torch.float64)
    opt = gk.AdamW([double], **options)
    double.grad = torch.ones_like(double)
    opt.step()
    assert opt.state[double]["exp_avg"].dtype == torch.float64
    plain = strided()
    opt = gk.AdamW([plain])
    plain.grad = torch.ones_like(plain)
    opt.step()
    assert opt.state[plain]["step"].item() == 1.0


def test_sparse_gradients_with_a_master_are_refused():
    embedding = nn.Embedding(10, 4, sparse=True).bfloat16()
    opt = gk.SGD(embedding.parameters(), lr=0.1, master="fp32")
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"master='fp32' needs dense plain tensors .* torch.sparse_coo gradient"):
        opt.step()


def test_state_in_memory_order_does_not_fit_another_order():
    p = nn.Parameter(torch.randn(16, 8))
    opt = gk.AdamW([p], state="int8")
    p.grad = torch.randn(16, 8)
    opt.step()
    saved = opt.state_dict()
    turned = nn.Parameter(p.detach().t().contiguous().t())
    with pytest.raises(ValueError, match=r"exp_avg was saved for shape \(16, 8\), stride \(8, 1\).*stride \(1, 16\)"):
        gk.AdamW([turned], state="int8").load_state_dict(saved)
    p.data = p.data.t()
    p.grad = torch.randn(8, 16)
    with pytest.raises(ValueError, match=r"a parameter of shape \(8, 16\), stride \(1, 8\) has shape \(16, 8\)"):
        opt.step()


@pytest.mark.parametrize("options", [{"state": "bf16"}, {"master": "split16"}], ids=str)
def test_state_of_one_number_an_element_is_laid_out_anew(options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(2, 3, 4, 4).bfloat16())]
    opt = gk.AdamW(params, **options)
    set_grads(params, 0, torch.bfloat16)
    opt.step()
    turned = [nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))]
    other = gk.AdamW(turned, **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for name, value in other.state[turned[0]].items():
        assert same_bits(value.contiguous(), opt.state[params[0]][name])
    set_grads(params, 1, torch.bfloat16)
    set_grads(turned, 1, torch.bfloat16)
    opt.step()
    other.step()
    if "state" not in options:  # random words belong to places in memory
        assert same_bits(params[0], turned[0].contiguous())


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bytes_held_are_those_of_the_formats(dtype, state, master):
    if not supported(dtype, master):
        return
    numel = 64 * 1024
    p = nn.Parameter(torch.zeros(numel, dtype=dtype))
    opt = gk.AdamW([p], state=state, master=master)
    p.grad = torch.ones_like(p)
    opt.step()
    master_bytes = 0 if dtype == torch.float32 else {None: 0, "fp32": 4, "split16": 2, "split8": 1}[master]
    default = 4 if master is not None else dtype.itemsize
    state_bytes = {None: default, "fp32": 4, "bf16": 2, "int8": 1 + 1 / 64}[state]
    held = held_bytes(opt) - 4  # the step counter
    assert held / numel == dtype.itemsize + master_bytes + 2 * state_bytes
    if dtype == torch.bfloat16 and (master, state) == ("split8", "int8"):
        assert held / numel <= 7.0


# --- dtypes that are left to torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"master": "split8", "state": "int8"}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_other_dtypes_are_torchs_to_the_bit(dtype, options):
    def train(kind, **extra):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(40, dtype=dtype))]
        opt = kind(params, lr=1e-2, foreach=False, **extra)
        for step in range(5):
            if step == 3:
                saved = copy.deepcopy(opt.state_dict())
                opt = kind(params, lr=1.0, foreach=False, **extra)
                opt.load_state_dict(saved)
            params[0].grad = torch.randn(40, dtype=dtype, generator=torch.Generator().manual_seed(step))
            opt.step()
        return [params[0].detach(), *(opt.state[params[0]][name] for name in ("exp_avg", "exp_avg_sq", "step"))]

    assert all(map(torch.equal, train(gk.AdamW, **options), train(torch.optim.AdamW)))


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: gk.SGD([p], state="int8"), "state='int8', but without momentum it keeps no state"),
        (lambda p: gk.AdamW([p], state="int8", amsgrad=True), "state='int8' cannot keep max_exp_avg_sq"),
        (lambda p: gk.AdamW([p.half()], master="split16"), r"splits fp32 into bf16 .* got a parameter of fp16"),
        (lambda p: gk.AdamW([p.half()], master="split8"), r"use master='fp32' or bf16 parameters"),
        (lambda p: gk.AdamW([p.half()], stochastic_rounding=True), "stochastic_rounding is for bf16 parameters"),
        (lambda p: gk.AdamW([p], master="fp64"), "master is 'fp64', expected one of None, 'fp32', 'split16', 'split8'"),
        (lambda p: gk.AdamW([p], state="fp8"), "state is 'fp8', expected one of None, 'fp32', 'bf16', 'int8'"),
        (lambda p: gk.AdamW([p], master="fp32", stochastic_rounding=True), "expected one of them"),
        (lambda p: gk.AdamW([p], seed=2**53), "expected 0 <= seed < 2"),
        (lambda p: gk.AdamW([p], seed=-1), "expected 0 <= seed < 2"),
    ],
)
def test_options_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.zeros(4).requires_grad_().detach())


def test_a_late_group_that_does_not_fit_is_refused_and_leaves_the_optimizer_as_it_was():
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    opt = gk.AdamW([p], master="split8")
    with pytest.raises(ValueError, match="got a parameter of fp16"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(4, dtype=torch.float16))]})
    assert len(opt.param_groups) == 1
    p.grad = torch.ones_like(p)
    opt.step()
    momentum = gk.SGD([p], momentum=0.9, state="int8")
    momentum.add_param_group({"params": [nn.Parameter(torch.zeros(4))], "momentum": 0.5})
    with pytest.raises(ValueError, match="without momentum it keeps no state"):
        momentum.add_param_group({"params": [nn.Parameter(torch.zeros(4))], "momentum": 0.0})
    assert len(momentum.param_groups) == 2


def trained(dtype, **options):
    params = start(dtype)
    opt = gk.AdamW(params, lr=1e-2, **options)
    for step in range(2):
        set_grads(params, step, dtype)
        opt.step()
    return params, opt


PRECISIONS = [
    {},
    {"state": "fp32"},
    {"state": "bf16"},
    {"state": "int8"},
    {"master": "fp32"},
    {"master": "split16"},
    {"master": "split8"},
    {"master": "split8", "state": "int8"},
]


def takes(loading, saved):
    """Whoever keeps a master makes one where none was saved; state that was asked for must be what was saved."""
    kept = {str(o): o.get("state") or ("fp32" if "master" in o else "bf16") for o in (saved, loading)}
    same_state = kept[str(saved)] == kept[str(loading)] if "state" in loading else kept[str(saved)] != "int8"
    return same_state and saved.get("master") in (None, loading.get("master"))


@pytest.mark.parametrize("saved", PRECISIONS, ids=str)
@pytest.mark.parametrize("loading", PRECISIONS, ids=str)
def test_state_goes_on_in_its_precision_or_is_refused_whole(saved, loading):
    params, opt = trained(torch.bfloat16, **saved)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    state_dict = torch.load(file)
    resumed, other = trained(torch.bfloat16, **loading)
    before = copy.deepcopy((other.state_dict(), [p.detach() for p in resumed]))
    if not takes(loading, saved):
        with pytest.raises(ValueError, match=r"construct it with the (state|master)= of the saved one"):
            other.load_state_dict(state_dict)
        assert str(other.state_dict()) == str(before[0])
        assert all(map(same_bits, resumed, before[1]))
        return
    with torch.no_grad():
        for p, q in zip(resumed, params, strict=True):
            p.copy_(q)
    other.load_state_dict(state_dict)
    for step in (2, 3):
        set_grads(params, step, torch.bfloat16)
        set_grads(resumed, step, torch.bfloat16)
        opt.step()
        other.step()
    if saved == loading:
        for p, q in zip(params, resumed, strict=True):
            assert same_bits(p, q)
            assert all(same_bits(value, other.state[q][name]) for name, value in opt.state[p].items())


def test_torchs_state_is_taken_where_it_says_the_same():
    params = start(torch.float32)
    theirs = torch.optim.AdamW(params, lr=1e-2)
    set_grads(params, 0, torch.float32)
    theirs.step()
    for options in ({}, {"state": "fp32"}, {"master": "split16"}):
        opt = gk.AdamW(params, **options)
        opt.load_state_dict(theirs.state_dict())
        assert all(same_bits(opt.state[p]["exp_avg"], theirs.state[p]["exp_avg"]) for p in params)
    for state in ("bf16", "int8"):
        with pytest.raises(ValueError, match=rf"exp_avg was saved as torch.float32.*state='{state}'"):
            gk.AdamW(params, state=state).load_state_dict(theirs.state_dict())
