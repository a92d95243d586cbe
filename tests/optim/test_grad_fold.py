"""Folding in backward: the accumulated gradient is autograd's, to the bit, in every corner."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern.testing import same_bits
from tests.optim.models import loss_of, micro_batch, mlp


def folded(model):
    """Parameters of ``model`` whose current gradient came from our hook."""
    opt = model.opt
    return [p for p in model.parameters() if opt._fold.partials(p, p.grad) is not None]


def pair():
    ours, theirs = mlp(), mlp()
    ours.opt = gk.AdamW(ours.parameters(), max_norm=1.0)
    return ours, theirs


def same_grads(ours, theirs):
    return all(
        (p.grad is None and q.grad is None) or same_bits(p.grad, q.grad)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_accumulated_gradients_have_autograds_bits_and_large_ones_are_folded():
    ours, theirs = pair()
    for k in range(4):
        for model in (ours, theirs):
            loss_of(model, k).backward()
        assert same_grads(ours, theirs)
        assert len(folded(ours)) == (0 if k == 0 else 1), "the first micro-batch is autograd's own tensor"


def test_norm_of_folded_gradients_is_the_norm_of_what_is_there():
    ours, _ = pair()
    for k in range(3):
        loss_of(ours, k).backward()
    expected = gk.get_total_norm([p.grad for p in ours.parameters()])
    assert len(folded(ours)) == 1
    ours.opt.step()
    assert same_bits(ours.opt.grad_norm, expected)


def test_first_micro_batch_is_taken_not_copied():
    model = mlp()
    gk.AdamW(model.parameters())
    seen = {}
    weight = model[3].weight
    node = torch.autograd.graph.get_gradient_edge(weight).node
    node.register_prehook(lambda grads: seen.setdefault("ptr", grads[0].data_ptr()) and None)
    loss_of(model, 0).backward()
    assert weight.grad.data_ptr() == seen["ptr"]


@pytest.mark.parametrize("how", ["mul_", "copy_", "view", "replace", "clip"])
def test_edited_gradients_are_normed_again(how):
    ours, _ = pair()
    for k in range(2):
        loss_of(ours, k).backward()
    grad = ours[3].weight.grad
    if how == "mul_":
        grad.mul_(3.0)
    elif how == "copy_":
        grad.copy_(torch.ones_like(grad))
    elif how == "view":
        grad.view(-1)[:10] = 3.0
    elif how == "replace":
        ours[3].weight.grad = torch.ones_like(grad)
    else:
        nn.utils.clip_grad_norm_(ours.parameters(), 0.01)
    expected = gk.get_total_norm([p.grad for p in ours.parameters()])
    ours.opt.step()
    assert same_bits(ours.opt.grad_norm, expected)


def test_autograd_grad_leaves_gradients_alone():
    ours, theirs = pair()
    for k in range(2):
        for model in (ours, theirs):
            loss_of(model, k).backward()
    torch.autograd.grad(loss_of(ours, 5), list(ours.parameters()))
    assert same_grads(ours, theirs)


def test_backward_of_some_parameters_only():
    ours, theirs = pair()
    for model in (ours, theirs):
        for k in range(2):
            loss_of(model, k).backward()
        loss_of(model, 2).backward(inputs=[model[3].weight, model[0].bias])
    assert same_grads(ours, theirs)


def test_a_layer_used_twice_and_recomputed():
    ours, theirs = pair()
    for model in (ours, theirs):
        for k in range(3):
            hidden = model[:3](micro_batch(k))
            twice = checkpoint(lambda y, layer=model[3]: layer(layer(y)), hidden, use_reentrant=False)
            twice.square().mean().backward()
    assert same_grads(ours, theirs)
    assert folded(ours)


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("midway")


def test_backward_that_raises_midway_leaves_what_torch_leaves():
    ours, theirs = pair()
    for model in (ours, theirs):
        loss_of(model, 0).backward()
        y = Fail.apply(model[0](micro_batch(1)))
        with pytest.raises(ArithmeticError, match="midway"):
            model[1:](y).square().mean().backward()
    assert same_grads(ours, theirs)
    for model in (ours, theirs):
        loss_of(model, 2).backward()
    assert same_grads(ours, theirs)


@pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")
def test_create_graph_takes_torchs_path():
    ours, theirs = pair()
    for model in (ours, theirs):
        loss_of(model, 0).backward()
        loss_of(model, 1).backward(create_graph=True)
    assert same_grads(ours, theirs)
    assert not folded(ours)
    assert ours[3].weight.grad.requires_grad
    for model in (ours, theirs):
        model.zero_grad()


def test_zero_grad_in_place_is_added_to():
    ours, theirs = pair()
    for model in (ours, theirs):
        loss_of(model, 0).backward()
        model.zero_grad(set_to_none=False)
        loss_of(model, 1).backward()
    assert same_grads(ours, theirs)


def test_gradients_kept_by_the_user_are_not_overwritten_after_zero_grad():
    ours, _ = pair()
    loss_of(ours, 0).backward()
    loss_of(ours, 1).backward()
    kept = ours[3].weight.grad
    copy = kept.clone()
    ours.opt.zero_grad()
    loss_of(ours, 2).backward()
    loss_of(ours, 3).backward()
    assert same_bits(kept, copy)


def test_users_post_accumulate_hooks_still_run():
    ours, _ = pair()
    norms = []
    ours[3].weight.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    for k in range(3):
        loss_of(ours, k).backward()
    assert len(norms) == 3
    assert norms[-1] == pytest.approx(float(ours[3].weight.grad.norm()))


def test_two_accumulators_of_one_parameter_are_refused_and_nothing_is_hooked():
    model, other = mlp(), mlp(seed=1)
    accumulator = gk.GradAccumulator(model.parameters())
    with pytest.raises(ValueError, match=r"already folded by another.*call detach\(\)"):
        gk.GradAccumulator([*other.parameters(), *model.parameters()])
    gk.GradAccumulator(other.parameters()).detach()  # the failed attempt owns nothing
    accumulator.detach()
    gk.GradAccumulator(model.parameters())


def test_an_optimizer_made_again_over_the_same_parameters_works():
    """As in a notebook: the old one lives until the name is bound again."""
    ours, theirs = pair()
    old = ours.opt
    ours.opt = gk.AdamW(ours.parameters(), max_norm=1.0)
    for k in range(3):
        for model in (ours, theirs):
            loss_of(model, k).backward()
    assert same_grads(ours, theirs)
    expected = gk.get_total_norm([p.grad for p in ours.parameters()])
    ours.opt.step()
    assert same_bits(ours.opt.grad_norm, expected)
    assert not old.state


def test_detach_leaves_torchs_gradients():
    ours, theirs = pair()
    for k in range(4):
        for model in (ours, theirs):
            loss_of(model, k).backward()
        if k == 1:
            ours.opt.detach()
    assert same_grads(ours, theirs)
    assert not folded(ours)


def test_detached_optimizer_still_clips():
    ours, _ = pair()
    ours.opt.detach()
    for k in range(2):
        loss_of(ours, k).backward()
    assert not folded(ours)
    expected = gk.get_total_norm([p.grad for p in ours.parameters()])
    ours.opt.step()
    assert same_bits(ours.opt.grad_norm, expected)
    ours.opt.attach()
    ours.opt.attach()  # already there: nothing happens
    loss_of(ours, 2).backward()
    assert folded(ours)


def test_a_dropped_optimizer_frees_its_hooks_and_the_parameters():
    model = mlp()
    opt = gk.AdamW(model.parameters())
    fold = weakref.ref(opt._fold)
    param = weakref.ref(model[3].weight)
    loss_of(model, 0).backward()
    del opt
    gc.collect()
    assert fold() is None
    gk.AdamW(model.parameters())
    del model
    gc.collect()
    assert param() is None
