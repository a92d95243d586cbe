"""Kinds sees every difference that would make a kernel read something else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern import functional
from gradkern.ops._kinds import Kinds
from gradkern.ops._table import AddressTable
from gradkern.testing import same_bits


def tensors():
    image = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return [torch.ones(4, 6), torch.ones(()), torch.ones(0), image]


CHANGES = {
    "dtype": lambda t: t.bfloat16(),
    "shape": lambda t: t.reshape(6, 4),
    "strides": lambda t: t.t().contiguous().t(),
    "numel": lambda t: torch.ones(4, 5),
    "dimension": lambda t: t.unsqueeze(0),
    "sparse": lambda t: t.to_sparse(),
    "device": lambda t: t.to("meta"),
    "subclass": lambda t: nn.Parameter(t),
    "missing": lambda t: None,
}


def test_others_of_the_same_kinds_are_recognised_and_nothing_is_kept_alive():
    kinds = Kinds()
    assert not kinds.are_those_of(tensors())
    kinds.remember(tensors())
    assert kinds.are_those_of(tensors())
    assert kinds.are_those_of([torch.zeros_like(t) for t in tensors()])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_difference_is_seen(change):
    kinds = Kinds()
    kinds.remember(tensors())
    first, *rest = tensors()
    assert not kinds.are_those_of([change(first), *rest])
    assert not kinds.are_those_of(rest)
    assert not kinds.are_those_of([first, *rest, first])


def test_tensors_without_strides_are_never_recognised():
    kinds = Kinds()
    kinds.remember([torch.ones(3).to_sparse()])
    assert not kinds.are_those_of([torch.ones(3).to_sparse()])


def test_memory_handed_out_again_for_another_shape_is_not_taken_for_the_old():
    memory = torch.arange(1.0, 9001.0)
    table = AddressTable()
    for size in (9000, 10, 10, 9000, 4097):
        found = functional.sumsq([memory[:size]], cache=table)
        assert same_bits(found, functional.sumsq([memory[:size]]))
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        found = functional.sumsq([memory.view(dtype)[1:7:2].contiguous(), memory.view(dtype)[:4097]], cache=table)
        assert same_bits(found, functional.sumsq([memory.view(dtype)[1:7:2].contiguous(), memory.view(dtype)[:4097]]))


def test_gradients_of_a_wrong_shape_are_refused_also_where_the_right_ones_lay():
    memory = torch.arange(24.0)
    param = nn.Parameter(torch.zeros(4, 6))
    accumulator = gk.GradAccumulator([param])
    for _ in range(3):
        accumulator.accumulate_([memory.view(4, 6)])
        for wrong in (memory[:8].view(2, 4), memory.view(6, 4), memory.view(6, 4).t(), memory.view(4, 6).double()):
            before = param.grad.clone()
            with pytest.raises(ValueError, match="expected fp32, bf16 or fp16 laid out as its parameter"):
                accumulator.accumulate_([wrong])
            assert same_bits(param.grad, before)
    accumulator.accumulate_([memory.bfloat16().view(4, 6)])
    accumulator.accumulate_([memory.view(4, 6)])
    assert torch.equal(param.grad, memory.view(4, 6) * 5)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"clip": gk.clip.AGC(0.01)}], ids=str)
def test_steps_follow_gradients_that_change_in_kind(options):
    """Every step beside a fresh optimizer, which knows nothing of earlier kinds."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5))]
    opt = gk.AdamW(params, lr=0.1, **options)
    grads = [torch.randn(4, 6), torch.randn(5)]
    changes = [
        lambda g: g,
        lambda g: g.clone(),
        lambda g: g.bfloat16(),
        lambda g: g.bfloat16(),
        lambda g: g.t().contiguous().t(),
        lambda g: g.t().contiguous().t(),
        lambda g: g,
        lambda g: None,
        lambda g: g,
    ]
    for change in changes:
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        twin = gk.AdamW(twins, lr=0.1, **options)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        for p, q in zip(params, twins, strict=True):
            p.grad_dtype = q.grad_dtype = None
        for p in (params[0], twins[0]):
            p.grad = change(grads[0])
        for p in (params[1], twins[1]):
            p.grad = grads[1].clone()
        opt.step()
        twin.step()
        assert all(map(same_bits, params, twins))


def test_parameters_given_other_memory_are_followed():
    param = nn.Parameter(torch.ones(4, 6))
    opt = gk.SGD([param], lr=0.5)
    for data in (param.data, torch.full((4, 6), 2.0), torch.full((6, 4), 3.0), torch.full((24,), 4.0)):
        param.grad = None
        param.data = data
        param.grad = torch.ones_like(data)
        expected = data - 0.5
        opt.step()
        assert torch.equal(param, expected)
    param.data = torch.arange(24.0).view(4, 6)
    for data in (param.data, param.data.t().contiguous().t()):  # the same numbers, laid out otherwise
        param.grad = None
        param.data = data.clone(memory_format=torch.preserve_format)
        param.grad = torch.arange(24.0).view(4, 6)
        opt.step()
        assert torch.equal(param, torch.arange(24.0).view(4, 6) / 2)
    param = nn.Parameter(torch.ones(24))
    adam = gk.AdamW([param])
    param.grad = torch.ones(24)
    adam.step()
    param.grad = None
    param.data = torch.ones(6, 4)
    param.grad = torch.ones(6, 4)
    for _ in range(2):  # also the second time
        before = param.detach().clone()
        try:
            adam.step()
        except (ValueError, RuntimeError):
            assert torch.equal(param, before)
        else:
            pytest.fail("state of another shape was taken")
