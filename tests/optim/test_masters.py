"""Masters follow their parameters, whoever changes them and whenever."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.testing import same_bits
from tests.optim.models import one


def with_master(master="fp32"):
    p, q = one(dtype=torch.bfloat16), one(dtype=torch.bfloat16)
    opt = gk.AdamW([p, q], master=master)
    opt.step()
    return p, q, opt


@pytest.mark.parametrize("resync", [False, True])
def test_a_change_between_loading_and_the_first_step_counts(resync):
    p, _, opt = with_master()
    opt.load_state_dict(opt.state_dict())
    with torch.no_grad():
        p.fill_(5.0)
    assert resync or same_bits(opt.state_dict()["state"][0]["master"], torch.full((4,), 5.0))
    if resync:
        opt.resync()
    opt.step()
    assert p[0].item() == 5.0


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_resync_counts_right_after_loading_too(master):
    p, _, opt = with_master(master)
    opt.load_state_dict(opt.state_dict())
    p.data.fill_(5.0)
    opt.resync()
    opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    opt.step()
    assert torch.equal(opt.state[p]["master"].float(), torch.full((4,), 5.0 if master == "fp32" else 0.0))


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_a_change_of_a_copied_optimizers_parameter_counts(master):
    _, _, opt = with_master(master)
    other = copy.deepcopy(opt)
    p, q = other.param_groups[0]["params"]
    before = other.state[q]["master"].clone()
    with torch.no_grad():
        p.fill_(5.0)
    saved = other.state_dict()["state"]
    assert torch.equal(saved[0]["master"].float(), torch.full((4,), 5.0 if master == "fp32" else 0.0))
    assert same_bits(saved[1]["master"], before)
    assert before.any()


@pytest.mark.parametrize("master", ["split16", "split8"])
def test_loading_the_model_after_the_optimizer_keeps_what_split_masters_hold(master):
    """Which order users load in must not cost the bits below the parameter's."""
    p, q, opt = with_master(master)
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone(), q.detach().clone()]
    opt.load_state_dict(saved)
    opt.state_dict()
    with torch.no_grad():
        p.copy_(weights[0])
        q.copy_(weights[1])
    assert same_bits(opt.state_dict()["state"][0]["master"], saved["state"][0]["master"])
    assert saved["state"][0]["master"].any()


def test_a_parameter_without_gradient_takes_its_master_along():
    _, q, opt = with_master()
    q.grad = None
    opt.step()
    with torch.no_grad():
        q.fill_(5.0)
    assert same_bits(opt.state_dict()["state"][1]["master"], torch.full((4,), 5.0))
    q.grad = torch.ones_like(q)
    opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    opt.step()
    assert same_bits(opt.state[q]["master"], torch.full((4,), 5.0))


def test_a_master_sent_elsewhere_waits_there():
    p, _, opt = with_master()
    opt.load_state_dict(opt.state_dict())
    elsewhere = opt.state[p]["master"].to("meta")
    opt.state[p]["master"] = elsewhere
    assert opt.state_dict()["state"][0]["master"] is elsewhere


@pytest.mark.parametrize("master", ["fp32", "split16"])
def test_a_parameter_changed_while_its_group_moves_takes_its_master_along(master):
    p, q = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    opt = gk.AdamW([{"params": [p]}, {"params": [q]}], master=master)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    opt.step()
    opt.param_groups[0]["params"] += opt.param_groups.pop()["params"]
    with torch.no_grad():
        q.fill_(5.0)
    opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    opt.step()
    assert torch.equal(opt.state[q]["master"].float(), torch.full((4,), 5.0 if master == "fp32" else 0.0))


def test_an_fp32_master_keeps_its_bits_where_an_edit_changed_nothing():
    """As where weights are clamped after every step, or swapped for their average and back."""
    ends = []
    for edit in (False, True):
        p = nn.Parameter(torch.tensor([1.0, 1.0, 9.0], dtype=torch.bfloat16))
        opt = gk.SGD([p], lr=1e-4, master="fp32")
        for _ in range(100):
            p.grad = torch.ones_like(p)
            opt.step()
            if edit:
                with torch.no_grad():
                    p.clamp_(max=2.0)
        ends.append(opt.state[p]["master"])
    assert same_bits(ends[0][:2], ends[1][:2])
    assert ends[0][0].item() == pytest.approx(0.99, abs=1e-5)
    assert ends[1][2].item() == pytest.approx(2.0 - 99e-4, abs=1e-5)


@pytest.mark.parametrize("away", [0.0, 2.0**-12], ids=["even", "away"])
def test_an_fp32_master_keeps_what_lies_halfway_between_two_parameters(away):
    """Steps round such to the one away from zero, ``param.copy_(master)`` to the even one; neither is a change."""
    values = torch.tensor([1.0 + 2.0**-8, -1.0 - 2.0**-8, 1.0 + 3 * 2.0**-8, 3.0])
    _, _, opt = with_master()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["master"] = values.clone()
    with torch.no_grad():
        opt.param_groups[0]["params"][0].copy_(values + away * values.sign())
    opt.load_state_dict(saved)
    assert same_bits(opt.state_dict()["state"][0]["master"], values)
    with torch.no_grad():
        opt.param_groups[0]["params"][0].add_(2.0**-6)
    assert not same_bits(opt.state_dict()["state"][0]["master"], values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.0])
def test_an_fp32_master_follows_to_any_value(value):
    p, _, opt = with_master()
    with torch.no_grad():
        p.fill_(value)
    master = opt.state_dict()["state"][0]["master"]
    assert torch.allclose(master, torch.full((4,), value), equal_nan=True, rtol=0.0, atol=0.0)
