"""What users do to parameters, state, groups and options between two steps, beside torch where torch has it."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.clip import AutoClip, GlobalNorm, GroupNorm, SkipOnSpike, ZClip
from gradkern.testing import same_bits
from tests.optim.models import OPTIMIZERS, one

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


THROWN_AWAY = [
    (how, options)
    for how in ("clear", "del", "popitem", "inner popitem", "new", "none", "momentum")
    for options in ({}, {"master": "fp32"}, {"state": "bf16"}, {"stochastic_rounding": True})
    if how != "momentum" or "state" not in options  # refused: without momentum there is no state
]


@pytest.mark.parametrize(("how", "options"), THROWN_AWAY, ids=str)
def test_a_momentum_that_is_thrown_away_begins_anew(how, options):
    """Its first gradient is not damped, in torch neither."""
    buffers = []
    for cls in (torch.optim.SGD, partial(gk.SGD, **options)):
        p = one(dtype=torch.bfloat16 if options else torch.float32)
        opt = cls([p], lr=0.1, momentum=0.0 if how == "momentum" else 0.9, dampening=0.5)
        opt.step()
        if how == "clear":
            opt.state.clear()
        elif how == "del":
            del opt.state[p]
        elif how == "popitem":
            opt.state.popitem()
        elif how == "inner popitem":
            while opt.state[p].get("momentum_buffer") is not None:
                dict(opt.state)[p].popitem()
        elif how == "new":
            opt.state = defaultdict(dict)
        elif how == "none":
            opt.state[p]["momentum_buffer"] = None
        opt.param_groups[0]["momentum"] = 0.9
        opt.step()
        buffers.append(opt.state[p]["momentum_buffer"].clone().float())
        opt.step()
        buffers.append(opt.state[p]["momentum_buffer"].clone().float())
    assert same_bits(buffers[0], buffers[2])
    assert torch.allclose(buffers[1], buffers[3], rtol=1e-6 if not options else 2.0**-8)


@pytest.mark.parametrize("options", [{}, {"master": "fp32"}, {"state": "bf16"}], ids=str)
@pytest.mark.parametrize("save", [lambda opt: opt.state_dict(), lambda opt: copy.deepcopy(opt).state_dict()])
def test_a_momentum_whose_first_step_was_skipped_has_not_begun(save, options):
    dtype = torch.bfloat16 if options else torch.float32
    options = {**options, "lr": 0.1, "momentum": 0.9, "dampening": 0.5, "skip_nonfinite": True}
    p, untouched = one(dtype=dtype), one(dtype=dtype)
    opt = gk.SGD([p], **options)
    p.grad[0] = torch.nan
    opt.step()
    saved = save(opt)
    assert options.keys() & {"master", "state"} or saved["state"] == {}
    for q, other in ((untouched, gk.SGD([untouched], **options)), (p, opt)):
        if q is not p:
            other.load_state_dict(saved)
        q.grad = torch.ones_like(q)
        other.step()
        assert same_bits(other.state[q]["momentum_buffer"].float(), torch.ones(4))


def test_a_momentum_given_after_a_skipped_step_counts():
    """It is the user's, not the zeros that waited for a first gradient."""
    p = one()
    opt = gk.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    p.grad[0] = torch.nan
    opt.step()
    opt.state[p]["momentum_buffer"] = torch.full((4,), 10.0)
    assert same_bits(opt.state_dict()["state"][0]["momentum_buffer"], torch.full((4,), 10.0))
    p.grad = torch.ones(4)
    opt.step()
    assert torch.allclose(opt.state[p]["momentum_buffer"], torch.full((4,), 9.5))


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
    fourth = gk.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    handle = first.clip.attach(fourth)
    with pytest.raises(ValueError, match="takes part already"):
        fourth.clip = first.clip
    assert fourth.clip is None
    handle.remove()
    first.clip.unbind(fourth)
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
