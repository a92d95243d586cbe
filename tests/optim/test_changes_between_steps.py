"""What users do to parameters, state, groups and options between two steps, beside torch where torch has it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.clip import AutoClip, GlobalNorm, GroupNorm, SkipOnSpike, ZClip
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


# --- memory -------------------------------------------------------------------------------------------------------


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
    assert after.steps[0].device.type == "meta"


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


@pytest.mark.parametrize("options", [None, {}, {"master": "fp32"}], ids=str)
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


# --- groups and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_that_is_taken_away_stays_as_it_is(name):
    p, q = one(), one()
    opt = OPTIMIZERS[name]([{"params": [p]}, {"params": [q]}])
    opt.step()
    group, kept, before = opt.param_groups.pop(), q.detach().clone(), p.detach().clone()
    opt.step()
    assert same_bits(q.detach(), kept)
    assert not same_bits(p.detach(), before)
    opt.param_groups.append(group)
    opt.step()
    assert not same_bits(q.detach(), kept)


def test_state_is_a_dictionary_in_every_way():
    p, q = one(), one()
    opt = gk.AdamW([p, q])
    opt.step()
    plain = dict(opt.state)
    for other in (opt.state.copy(), copy.copy(opt.state), opt.state | {}, {} | opt.state):
        assert other == plain
        assert type(other) is defaultdict
        assert other[nn.Parameter(torch.ones(1))] == {}
    fresh = {"exp_avg": torch.full((4,), 5.0), "exp_avg_sq": torch.ones(4), "step": torch.tensor(7.0)}
    opt.state |= {p: dict(fresh)}
    opt.step()
    assert float(opt.state[p]["step"]) == 8.0
    assert torch.allclose(opt.state[p]["exp_avg"], torch.full((4,), 4.6))


@pytest.mark.parametrize("how", ["clear", "del", "popitem", "inner popitem", "new", "none", "momentum"])
def test_a_momentum_that_is_thrown_away_begins_anew(how):
    """Its first gradient is not damped, in torch neither."""
    buffers = []
    for cls in (torch.optim.SGD, gk.SGD):
        p = one()
        opt = cls([p], lr=0.1, momentum=0.0 if how == "momentum" else 0.9, dampening=0.5)
        opt.step()
        if how == "clear":
            opt.state.clear()
        elif how == "del":
            del opt.state[p]
        elif how == "popitem":
            opt.state.popitem()
        elif how == "inner popitem":
            dict(opt.state)[p].popitem()
        elif how == "new":
            opt.state = defaultdict(dict)
        elif how == "none":
            opt.state[p]["momentum_buffer"] = None
        opt.param_groups[0]["momentum"] = 0.9
        opt.step()
        buffers.append(opt.state[p]["momentum_buffer"])
        opt.step()
        buffers.append(opt.state[p]["momentum_buffer"].clone())
    assert same_bits(buffers[0], buffers[2])
    assert torch.allclose(buffers[1], buffers[3])


@pytest.mark.parametrize("save", [lambda opt: opt.state_dict(), lambda opt: copy.deepcopy(opt).state_dict()])
def test_a_momentum_whose_first_step_was_skipped_has_not_begun(save):
    p = one()
    opt = gk.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    p.grad[0] = torch.nan
    opt.step()
    saved = save(opt)
    assert saved["state"] == {}
    for q, other in ((one(), None), (p, opt)):
        other = other or gk.SGD([q], lr=0.1, momentum=0.9, dampening=0.5)
        if q is not p:
            other.load_state_dict(saved)
        q.grad = torch.ones(4)
        other.step()
        assert same_bits(other.state[q]["momentum_buffer"], torch.ones(4))


# --- hyper-parameters and policies --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_tensor_replaced_by_zero_counts_as_zero(key):
    p = one()
    opt = gk.SGD([p], **{"lr": 0.1, key: torch.tensor(0.5)})
    opt.step()
    q = nn.Parameter(p.detach().clone())
    twin = gk.SGD([q], **{"lr": 0.1, key: 0.0})
    q.grad = torch.ones(4)
    opt.param_groups[0][key] = 0.0
    opt.step()
    twin.step()
    assert same_bits(p.detach(), q.detach())


def test_setting_max_norm_keeps_what_else_the_policy_is():
    clip = GroupNorm(10.0, norm_type=float("inf"), error_if_nonfinite=True)
    opt = gk.AdamW([one()], clip=clip)
    opt.max_norm = 2.0
    assert opt.clip is clip
    assert opt.max_norm == clip.max_norm == 2.0
    with pytest.raises(ValueError, match="max_norm must be at least 0"):
        opt.max_norm = -1.0
    with pytest.raises(ValueError, match="max_norm must be at least 0"):
        clip.max_norm = float("nan")
    assert opt.max_norm == 2.0
    opt.max_norm = None
    assert opt.clip is None
    opt.max_norm = 3.0
    assert type(opt.clip) is GlobalNorm
    assert opt.max_norm == 3.0


def joint(first, second):
    """What a step of both moves parameters of zero by, with gradients of length 3 and 4."""
    moved = []
    for opt, length in ((first, 3.0), (second, 4.0)):
        (p,) = opt.param_groups[0]["params"]
        with torch.no_grad():
            p.zero_()
        p.grad = torch.tensor([length])
    for opt in (first, second):
        opt.step()
        moved.append(-opt.param_groups[0]["params"][0].item())
    return pytest.approx(moved, rel=1e-5)


def test_a_shared_policy_may_be_set_changed_and_taken_away():
    first, second = (gk.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    third = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert joint(first, second) == [3.0, 4.0]
    first.clip = second.clip = GlobalNorm(1.0)
    assert joint(first, second) == [0.6, 0.8]
    first.max_norm = 2.0
    assert joint(first, second) == [1.2, 1.6]
    second.clip = None
    assert joint(first, second) == [2.0, 4.0]
    second.clip = first.clip
    assert joint(first, second) == [1.2, 1.6]
    second.clip = None
    first.clip.attach(third).remove()
    first.clip.attach(third)  # counts once
    assert joint(first, third) == [1.2, 1.6]
    for member in (first, third):
        with pytest.raises(ValueError, match="takes part already"):
            first.clip.attach(member)
    assert joint(first, third) == [1.2, 1.6]
    third.param_groups[0]["params"][0].grad = None
    with pytest.raises(TypeError, match="clip is a float"):
        first.clip = 1.0
    assert joint(first, third) == [1.2, 1.6]


def test_a_policy_set_later_is_checked_as_one_given_at_the_start():
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    opt = gk.SGD([p], lr=0.1)
    opt.step()
    opt.clip = gk.clip.Value(1.0)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="expected dense ones"):
        opt.step()
    assert same_bits(p.detach(), before)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"clip": GlobalNorm(1.0)}])
def test_a_copy_clips_as_the_optimizer_does_now(options):
    opt = gk.AdamW([one()], **options)
    opt.clip = None
    assert copy.deepcopy(opt).clip is None
    opt.max_norm = 2.0
    assert copy.deepcopy(opt).max_norm == 2.0


def test_a_round_of_a_joint_norm_ends_with_its_gradients():
    """Not when others take their place, which may have their id and version."""
    clip = GlobalNorm(1.0)
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first, second = gk.SGD([p], lr=1.0, clip=clip), gk.SGD([q], lr=1.0, clip=clip)
    recycled = 0
    for _ in range(200):
        p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
        first.step()
        old = id(q.grad)
        q.grad = None
        p.grad, q.grad = torch.tensor([30.0]), torch.tensor([40.0])
        recycled += id(q.grad) == old
        second.step()
        assert float(second.grad_norm) == 50.0
    assert recycled > 0
    p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
    first.step()
    q.grad.mul_(10.0)
    second.step()
    assert float(second.grad_norm) == pytest.approx(1609.0**0.5)


# --- loading ------------------------------------------------------------------------------------------------------


def test_what_a_load_hook_returns_is_loaded_and_checked():
    p = one(dtype=torch.bfloat16)
    opt = gk.AdamW([p], master="fp32")
    opt.step()
    seen = []

    def change(_, loaded):
        loaded = copy.deepcopy(loaded)
        loaded["state"][0]["exp_avg"].fill_(7.03)
        loaded["state"][0]["master"].fill_(0.99901)
        return loaded

    handle = opt.register_load_state_dict_pre_hook(change)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg"].clone()))
    opt.load_state_dict(opt.state_dict())
    assert same_bits(opt.state[p]["exp_avg"], torch.full((4,), 7.03))
    assert same_bits(opt.state[p]["master"], torch.full((4,), 0.99901))
    assert same_bits(seen[0], torch.full((4,), 7.03))
    handle.remove()

    opt.register_load_state_dict_pre_hook(
        lambda _, loaded: {**loaded, "state": {0: {"exp_avg": torch.zeros(4).byte()}}}
    )
    with pytest.raises(ValueError, match=r"exp_avg was saved as torch\.uint8"):
        opt.load_state_dict(opt.state_dict())
    assert same_bits(opt.state[p]["exp_avg"], torch.full((4,), 7.03))


@pytest.mark.parametrize(
    ("saved", "loading"),
    [(AutoClip(history=5), ZClip()), (SkipOnSpike(), ZClip()), (AutoClip(history=5), AutoClip())],
    ids=["names", "fewer", "shapes"],
)
def test_the_memory_of_another_policy_is_refused_before_anything_is_loaded(saved, loading):
    p, q = one(), one()
    opt, other = gk.AdamW([p], clip=saved), gk.AdamW([q], clip=loading, lr=0.5)
    opt.step()
    state = opt.state_dict()
    with pytest.raises(ValueError, match="memory of another policy"):
        other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.5
    assert not other.state
    del state["clip"]
    other.load_state_dict(state)
    other.step()
    assert other.param_groups[0]["lr"] == 1e-3
