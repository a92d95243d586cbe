"""Where state lies may change between two steps, with a trace or without: nothing is lost, nothing else is written."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits
from tests.optim.models import OPTIMIZERS, one

SHAPES = ((30, 50), (7,), (3, 4097))


def params_of(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_a_parameter_converted_between_steps_is_not_written_beyond_its_end():
    memory = torch.ones(64, dtype=torch.bfloat16)
    p = one(size=16)
    p.grad_dtype = None
    opt = gk.SGD([p], lr=0.1)
    opt.step()
    p.data = memory[:16]
    for _ in range(2):
        opt.step()
    assert same_bits(memory[16:], torch.ones(48, dtype=torch.bfloat16))
    expected = torch.ones(16, dtype=torch.bfloat16)
    for _ in range(2):
        expected = (expected.float() - 0.1).bfloat16()
    assert same_bits(p.detach(), expected)


def test_a_step_that_was_refused_is_refused_again():
    """What was remembered of tensors that failed their checks must not pass for what was checked."""
    p = one(size=16)
    opt = gk.AdamW([p], lr=0.1, state="fp32")
    opt.step()
    before = copy.deepcopy(opt.state[p])
    p.data, p.grad = p.data.view(4, 4), None
    p.grad = torch.ones(4, 4)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"exp_avg.* has shape \(16,\)"):
            opt.step()
    assert same_bits(opt.state[p]["exp_avg"], before["exp_avg"])
    p.grad = None
    p.data = p.data.view(16)
    p.grad = torch.ones(16)
    opt.step()
    assert float(opt.state[p]["step"]) == 2.0


def test_what_a_refused_step_did_not_reach_is_still_checked_at_the_next():
    p, q = one(size=16), one(size=16)
    opt = gk.AdamW([{"params": [p]}, {"params": [q]}], state="fp32")
    opt.step()
    for x in (p, q):
        x.grad = None
        x.data = x.data.view(4, 4)
        x.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"expected shape \(4, 4\)"):
        opt.step()
    p.grad = None
    p.data = p.data.view(16)
    p.grad = torch.ones(16)
    with pytest.raises(ValueError, match=r"expected shape \(4, 4\)"):
        opt.step()


def test_a_parameter_on_another_device_is_planned_anew():
    """Without state nothing else tells: the counters of the last step lie where the parameter was."""
    p = one()
    opt = gk.SGD([p], lr=0.1)
    opt.step()
    (before,) = opt._gathering.buckets(opt)
    opt._gathering.done()
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().to("meta")))
    p.grad = torch.ones(4, device="meta")
    (after,) = opt._gathering.buckets(opt)
    assert after is not before
    assert after.steps[0].data_ptr() != before.steps[0].data_ptr()
    assert after.steps[0].device.type == "cpu"  # on the meta device a number would be lost


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("options", [{}, {"state": "int8"}, {"master": "fp32"}, {"master": "split16"}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_may_be_given_other_memory_without_a_trace(name, options, one_by_one):
    """As those do who send it elsewhere while they need the memory: ``tensor.data = tensor.data.to(...)``."""
    dtype = torch.bfloat16 if "master" in options else torch.float32
    params, twins = params_of(dtype=dtype), params_of(dtype=dtype)
    opt, twin = OPTIMIZERS[name](params, **options), OPTIMIZERS[name](twins, **options)
    for k in range(6):
        give_grads(params, k)
        give_grads(twins, k)
        opt.step()
        twin.step()
        for state in opt.state.values():
            names = sorted(state)
            for key in [names[k % len(names)]] if one_by_one else names:
                state[key].data = state[key].data.clone()
    assert len(opt.state) == len(twin.state) == 3
    for p, q in zip(params, twins, strict=True):
        assert same_bits(p, q)
        assert opt.state[p].keys() == twin.state[q].keys()
        assert all(same_bits(opt.state[p][key], twin.state[q][key]) for key in opt.state[p])


WAYS_IN = {
    "item": lambda opt, p: opt.state[p]["exp_avg_sq"],
    "get": lambda opt, p: opt.state.get(p).get("exp_avg_sq"),
    "values": lambda opt, p: list(next(iter(opt.state.values())).values())[1],
    "items": lambda opt, p: dict(dict(opt.state.items())[p].items())["exp_avg_sq"],
    "dict": lambda opt, p: dict(opt.state)[p]["exp_avg_sq"],
    "copy": lambda opt, p: opt.state.copy()[p]["exp_avg_sq"],
    "copies": lambda opt, p: dict(opt.state)[p].copy()["exp_avg_sq"],
    "star": lambda opt, p: {**opt.state}[p]["exp_avg_sq"],
    "or": lambda opt, p: (opt.state | {})[p]["exp_avg_sq"],
    "setdefault": lambda opt, p: dict(opt.state)[p].setdefault("exp_avg_sq", None),
    "state_dict": lambda opt, p: opt.state_dict()["state"][0]["exp_avg_sq"],
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_memory_given_to_one_small_tensor_is_seen_whatever_way_it_was_reached(way):
    p = one()
    opt = gk.AdamW([p])
    for k in range(3):
        opt.step()
        inner = WAYS_IN[way](opt, p)
        inner.data = torch.full((4,), float(k))
    opt.step()
    assert not opt._gathering._changes.read  # steps that follow no look ask nothing
    assert torch.allclose(opt.state[p]["exp_avg_sq"], torch.full((4,), 2.0 * 0.999 + 0.001))


@pytest.mark.parametrize(
    ("size", "names"), [(4, ("exp_avg", "exp_avg_sq")), (1 << 14, ("exp_avg",)), (1 << 14, ("exp_avg_sq",))]
)
def test_memory_given_to_tensors_kept_since_an_earlier_step_is_seen(size, names):
    """All of them, or those that are worth sending elsewhere."""
    p = one(size=size)
    opt = gk.AdamW([p])
    opt.step()
    kept = [opt.state[p][name] for name in names]
    opt.step()
    for tensor in kept:
        tensor.data = torch.full((size,), 5.0)
    opt.step()
    assert all((tensor < 5.0).all() for tensor in kept)


@pytest.mark.parametrize("how", ["item", "update", "state", "load", "data"])
def test_state_that_is_replaced_is_freed_at_once(how):
    p = one()
    opt = gk.AdamW([p])
    opt.step()
    array = np.zeros(4, dtype=np.float32)
    alive = weakref.ref(array)
    opt.state[p]["exp_avg"] = torch.from_numpy(array)
    del array
    opt.step()
    assert alive() is not None
    new = {**opt.state[p], "exp_avg": torch.ones(4)}
    if how == "item":
        opt.state[p]["exp_avg"] = new["exp_avg"]
    elif how == "update":
        opt.state[p].update(new)
    elif how == "state":
        opt.state[p] = new
    elif how == "load":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt.state[p]["exp_avg"].data = new["exp_avg"]
    del new
    gc.collect()
    assert alive() is None
    opt.step()
    assert float(opt.state[p]["step"]) == 3.0


@pytest.mark.parametrize("options", [None, {}, {"master": "fp32"}, {"momentum": 0.9}], ids=str)
def test_a_parameter_that_was_replaced_is_freed_with_the_next_step(options):
    p, q = (one(dtype=torch.bfloat16) for _ in range(2))
    opt = torch.optim.SGD([p, q], lr=0.1) if options is None else gk.SGD([p, q], lr=0.1, **options)
    opt.step()
    p.grad = None
    opt.step()
    opt.state.pop(p, None)
    opt.param_groups[0]["params"] = [q]
    opt.step()
    alive = weakref.ref(p)
    del p
    gc.collect()
    assert alive() is None


def test_gradients_are_freed_where_a_later_group_is_refused():
    p, q = one(), nn.Parameter(torch.ones(3, 2))
    opt = gk.AdamW([{"params": [p]}, {"params": [q]}])
    q.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert not opt.state
    alive = weakref.ref(p.grad)
    p.grad = None
    gc.collect()
    assert alive() is None


def test_small_tensors_kept_since_an_earlier_step_are_written_where_they_lay_and_nowhere_else():
    """Looking at each of thousands costs more than their update. ``resync`` does."""
    params = [one(size=64) for _ in range(40)]
    opt = gk.AdamW(params)
    opt.step()
    array = np.zeros(64, dtype=np.float32)
    alive = weakref.ref(array)
    opt.state[params[20]]["exp_avg_sq"] = torch.from_numpy(array)
    del array
    opt.step()
    kept = [opt.state[p]["exp_avg_sq"] for p in params]
    opt.step()
    for tensor in kept:
        tensor.data = torch.full((64,), 5.0)
    gc.collect()
    assert alive() is not None  # nobody else may be given what a kernel is about to write
    others = [torch.ones(64) for _ in range(400)]
    opt.step()
    assert all(same_bits(other, torch.ones(64)) for other in others)
    opt.resync()
    opt.step()
    assert all((tensor < 5.0).all() for tensor in kept)
    gc.collect()
    assert alive() is None


def test_a_step_of_a_partner_does_not_make_a_look_forgotten():
    """A joint norm gathers the gradients of all."""
    clip = gk.clip.GlobalNorm(1.0)
    p, q = one(), one()
    first, second = gk.AdamW([p], clip=clip), gk.AdamW([q], clip=clip)
    for _ in range(2):
        first.step()
        second.step()
    tensor = second.state[q]["exp_avg_sq"]
    first.step()
    tensor.data = torch.full((4,), 5.0)
    second.step()
    assert (tensor < 5.0).all()
    assert (tensor > 4.9).all()


@pytest.mark.parametrize("size", [16, 1 << 14])
@pytest.mark.parametrize("kind", ["half", "part", "transposed"])
def test_state_at_its_old_address_but_of_another_kind_is_not_walked_as_before(size, kind):
    side = int(size**0.5)
    p = nn.Parameter(torch.ones(side, side))
    p.grad = torch.arange(float(size)).view(side, side)
    opt = gk.AdamW([p], weight_decay=0.0)
    opt.step()
    tensor = opt.state[p]["exp_avg"]
    if kind == "transposed":
        q = nn.Parameter(p.detach().clone())
        q.grad = p.grad.clone()
        twin = torch.optim.AdamW([q], weight_decay=0.0)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        twin.state[q]["exp_avg"].data = twin.state[q]["exp_avg"].data.t()
        tensor.data = tensor.data.t()
        opt.step()
        twin.step()
        assert torch.allclose(p, q)
        return
    memory = tensor.data
    tensor.data = (
        memory[: side // 2] if kind == "part" else memory.view(-1).view(torch.bfloat16)[:size].view(side, side)
    )
    before = p.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match=r"size|dtype|shape"):
        opt.step()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_dict_goes_on_counting_as_torchs_does(name):
    p = one()
    opt = OPTIMIZERS[name]([p])
    opt.step()
    saved = opt.state_dict()
    for _ in range(3):
        opt.step()
    now = opt.state_dict()["state"][0]
    assert all(same_bits(saved["state"][0][key], now[key]) for key in now)


@pytest.mark.parametrize("how", ["all", "one", "copy"])
def test_state_taken_over_from_another_optimizer_is_ones_own(how):
    results = []
    for cls in (torch.optim.AdamW, gk.AdamW):
        p = one()
        first, second = cls([p], lr=0.1), cls([p], lr=0.1)
        first.step()
        p.grad *= 5
        second.step()
        if how == "all":
            second.state = first.state
        elif how == "one":
            second.state[p] = first.state[p]
        else:
            second = copy.copy(first)
        second.step()
        second.state[p]["exp_avg"] = torch.zeros(4)
        second.step()
        results.append(p.detach())
    assert torch.allclose(*results)


def test_a_large_tensor_kept_since_an_earlier_step_and_laid_otherwise_is_seen():
    """At the address where it lay."""
    ends = []
    for cls in (torch.optim.AdamW, gk.AdamW):
        p = nn.Parameter(torch.ones(128, 128))
        p.grad = torch.arange(float(1 << 14)).view(128, 128)
        opt = cls([p])
        opt.step()
        kept = opt.state[p]["exp_avg"]
        opt.step()
        kept.data = kept.data.t()
        opt.step()
        ends.append(p.detach())
    assert torch.allclose(*ends)


def test_block_exponents_cut_short_are_refused():
    p = one(size=200)
    opt = gk.AdamW([p], state="int8")
    for _ in range(2):
        opt.step()
    scale = opt.state[p]["exp_avg_scale"]
    scale.data = scale.data[:3]
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"exp_avg_scales.* has 3 elements, expected 4"):
        opt.step()
    assert same_bits(p.detach(), before)
